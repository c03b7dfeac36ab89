// The store's private directory: who may use it, who owns it, and how small files in it are replaced.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "io/io_engine.hpp"
#include "lmcn/status.hpp"
#include "nvme/format.hpp"

namespace lmcn::nvme {

/// Owns a descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Fd& operator=(Fd&& other) noexcept;
  ~Fd() { reset(); }
  int get() const noexcept { return fd_; }
  bool valid() const noexcept { return fd_ >= 0; }
  void reset() noexcept;

 private:
  int fd_ = -1;
};

/// Holds the directory and its lock from open() to the destructor. All files are reached through its descriptor.
class Directory {
 public:
  /// Makes the directory (0700, parents too) when absent. kInvalidArgument: not a directory, a symbolic link, another user's,
  /// or open to others. kLocked: after `lock_wait`, with the owner's pid.
  static Result<std::unique_ptr<Directory>> open(const std::string& path, std::chrono::milliseconds lock_wait);
  /// For tools: one that is there, with its lock taken at once or kLocked; makes and writes nothing. Refuses what open() refuses.
  /// kNotFound: no such directory, or no LOCK in it. `exclusive` keeps other tools out too.
  static Result<std::unique_ptr<Directory>> open_existing(const std::string& path, bool exclusive);
  ~Directory();
  /// Lets another process have it; nothing may be written afterwards.
  void unlock() noexcept;

  const std::string& path() const noexcept { return path_; }
  std::string path_of(const std::string& name) const { return path_ + "/" + name; }
  /// O_NOFOLLOW | O_CLOEXEC, 0600; refuses what is not a regular file of ours. kNotFound when absent without O_CREAT.
  Result<Fd> open_file(const std::string& name, int flags) const;
  Status rename(const std::string& from, const std::string& to) const;
  Status remove(const std::string& name) const;  // ok when absent
  Status sync() const;                           // fsync of the directory itself
  /// Sizes of the file system that the directory is on.
  Result<std::uint64_t> file_system_bytes() const;
  Result<std::uint64_t> free_bytes() const;

 private:
  Directory(std::string path, Fd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  static Result<std::unique_ptr<Directory>> open_unlocked(const std::string& path);
  Status lock(std::chrono::milliseconds wait);

  std::string path_;
  Fd fd_;
  Fd lock_;
};

/// Replaces `name` as a whole: everything goes to name.tmp; commit() syncs, renames, syncs the directory. Without commit() the
/// destructor removes the .tmp file.
class FileReplacement {
 public:
  static Result<FileReplacement> create(const Directory& directory, io::IoEngine& engine, std::string name);
  FileReplacement(FileReplacement&& other) noexcept = default;
  ~FileReplacement();
  Status write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  Status commit();

 private:
  FileReplacement(const Directory& directory, io::IoEngine& engine, std::string name, Fd fd)
      : directory_(&directory), engine_(&engine), name_(std::move(name)), fd_(std::move(fd)) {}
  const Directory* directory_;
  io::IoEngine* engine_;
  std::string name_;
  Fd fd_;  // invalid after commit()
};

/// nullopt: there is none yet. kFormatVersion: another version (nothing was changed). kCorruption: not a whole superblock.
Result<std::optional<Superblock>> load_superblock(const Directory& directory, io::IoEngine& engine);
/// Fills format and checksum, then replaces the file durably.
Status store_superblock(const Directory& directory, io::IoEngine& engine, Superblock& superblock);

}  // namespace lmcn::nvme
