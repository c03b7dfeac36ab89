// data.000: regions at fixed places, allocated one by one.
#pragma once

#include <cstdint>
#include <string>

#include "lmcn/status.hpp"
#include "nvme/directory.hpp"

namespace lmcn::nvme {

class DataFile {
 public:
  /// O_DIRECT; buffered where the file system refuses that.
  static Result<DataFile> open(const Directory& directory, std::uint64_t region_bytes);

  int fd() const noexcept { return fd_.get(); }
  bool direct() const noexcept { return direct_; }
  const std::string& path() const noexcept { return path_; }
  /// Whole regions in the file; a partial one at the end is cut off.
  Result<std::uint32_t> regions();
  /// Reserves the region's blocks (fallocate; where unsupported, only the size) and extends the file. On failure the file is as
  /// before.
  Status allocate(std::uint32_t region);
  /// Gives the region's blocks back. kUnsupported where the file system cannot.
  Status punch(std::uint32_t region);
  Status truncate(std::uint32_t regions);

 private:
  DataFile(std::string path, Fd fd, bool direct, std::uint64_t region_bytes)
      : path_(std::move(path)), fd_(std::move(fd)), direct_(direct), region_bytes_(region_bytes) {}
  Result<std::uint64_t> bytes() const;

  std::string path_;
  Fd fd_;
  bool direct_;
  std::uint64_t region_bytes_;
};

}  // namespace lmcn::nvme
