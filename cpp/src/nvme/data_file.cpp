#include "nvme/data_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "nvme/striped_log.hpp"

namespace lmcn::nvme {

Result<DataFile> DataFile::open(const Directory& directory, std::uint64_t region_bytes) {
  Result<Fd> fd = directory.open_file("data.000", O_RDWR | O_CREAT | O_DIRECT);
  const bool refused = !fd.ok() && (fd.status().sys_errno() == EINVAL || fd.status().sys_errno() == EOPNOTSUPP);
  if (refused) fd = directory.open_file("data.000", O_RDWR | O_CREAT);
  if (!fd.ok()) return fd.status();
  return DataFile(directory.path_of("data.000"), std::move(fd).value(), !refused, region_bytes);
}

Result<std::uint64_t> DataFile::bytes() const {
  struct stat found{};
  if (::fstat(fd_.get(), &found) != 0) return Status::from_errno(errno, "fstat " + path_);
  return static_cast<std::uint64_t>(found.st_size);
}

Result<std::uint32_t> DataFile::regions() {
  Result<std::uint64_t> size = bytes();
  if (!size.ok()) return size.status();
  if (*size / region_bytes_ > kMaxRegionsPerPath) {
    return Status(Code::kCorruption, path_ + " has " + std::to_string(*size) + " bytes, more than " +
                                         std::to_string(kMaxRegionsPerPath) + " regions of " + std::to_string(region_bytes_) +
                                         " bytes; nothing was changed: remove its directory to start anew");
  }
  const auto count = static_cast<std::uint32_t>(*size / region_bytes_);
  if (*size % region_bytes_ != 0) LMCN_RETURN_IF_ERROR(truncate(count));
  return count;
}

Status DataFile::allocate(std::uint32_t region) {
  const std::uint64_t begin = region * region_bytes_;
  Result<std::uint64_t> size = bytes();
  if (!size.ok()) return size.status();
  if (::fallocate(fd_.get(), 0, static_cast<off_t>(begin), static_cast<off_t>(region_bytes_)) == 0) return {};
  const int error = errno;
  if (error == EOPNOTSUPP || error == ENOSYS) {
    if (*size >= begin + region_bytes_ || ::ftruncate(fd_.get(), static_cast<off_t>(begin + region_bytes_)) == 0) return {};
    return Status::from_errno(errno, "ftruncate " + path_);
  }
  // A failed fallocate may keep the blocks it got.
  if (*size <= begin) {
    LMCN_RETURN_IF_ERROR(truncate(region));
  } else {
    LMCN_RETURN_IF_ERROR(punch(region));
  }
  return Status::from_errno(error, "fallocate of region " + std::to_string(region) + " in " + path_);
}

Status DataFile::punch(std::uint32_t region) {
  if (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(region * region_bytes_),
                  static_cast<off_t>(region_bytes_)) == 0) {
    return {};
  }
  const int error = errno;
  return Status::from_errno(error, "punch region " + std::to_string(region) + " out of " + path_,
                            error == EOPNOTSUPP || error == ENOSYS ? Code::kUnsupported : Code::kIoError);
}

Status DataFile::truncate(std::uint32_t regions) {
  if (::ftruncate(fd_.get(), static_cast<off_t>(regions * region_bytes_)) == 0) return {};
  return Status::from_errno(errno, "ftruncate " + path_);
}

}  // namespace lmcn::nvme
