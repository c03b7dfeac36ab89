// The store's private directory: who may use it, who owns it, and how small files in it are replaced.
#pragma once

#include <sys/statfs.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/fork_guard.hpp"
#include "io/io_engine.hpp"
#include "lmcn/status.hpp"
#include "nvme/format.hpp"
#include "nvme/in_flight.hpp"

namespace lmcn::nvme {

/// Files of a store are open in its process only, never in a child that it forks.
using Fd = ProcessFd;

/// "NFS", "SMB/CIFS", ... for a statfs f_type that is a network file system's; nullptr for all others.
const char* network_file_system(std::uint64_t f_type) noexcept;
/// fstatfs(); tests put another in its place.
extern std::atomic<int (*)(int fd, struct statfs* found)> fstatfs_call;

/// Holds the directory and its lock from open() to the destructor. All files are reached through its descriptor.
class Directory {
 public:
  /// Makes the directory (0700, parents too) when absent. kInvalidArgument: not a directory, a symbolic link, another user's,
  /// open to others, or on a network file system (where neither the lock nor what was synced is sure to hold) unless
  /// `allow_network`. kLocked: after `lock_wait`, with the owner's pid.
  static Result<std::unique_ptr<Directory>> open(const std::string& path, std::chrono::milliseconds lock_wait,
                                                 bool allow_network = false);
  /// For tools: one that is there, with its lock taken at once or kLocked; makes and writes nothing. Refuses what open() refuses.
  /// kNotFound: no such directory, or no LOCK in it. `exclusive` keeps other tools out too.
  static Result<std::unique_ptr<Directory>> open_existing(const std::string& path, bool exclusive);
  ~Directory();
  /// Lets another process have it; nothing may be written afterwards.
  void unlock() noexcept;

  const std::string& path() const noexcept { return path_; }
  std::string path_of(const std::string& name) const { return path_ + "/" + name; }
  /// O_NOFOLLOW | O_CLOEXEC; 0600, whatever the umask and whatever it was; refuses what is not a regular file of ours. kNotFound
  /// when absent without O_CREAT. Opened to look only (open_existing, not exclusive), modes stay as they are.
  Result<Fd> open_file(const std::string& name, int flags) const;
  Status rename(const std::string& from, const std::string& to) const;
  Status remove(const std::string& name) const;  // ok when absent
  Status sync() const;                           // fsync of the directory itself
  /// Sizes of the file system that the directory is on.
  Result<std::uint64_t> file_system_bytes() const;
  Result<std::uint64_t> free_bytes() const;

 private:
  Directory(std::string path, Fd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  static Result<std::unique_ptr<Directory>> open_unlocked(const std::string& name, bool allow_network);
  Status lock(std::chrono::milliseconds wait);

  std::string path_;
  Fd fd_;
  Fd lock_;
  bool looks_ = false;  // changes no modes
};

/// Replaces `name` as a whole: everything goes to name.tmp; commit() syncs, renames, syncs the directory. Without commit() the
/// destructor removes the .tmp file.
class FileReplacement {
 public:
  /// Each operation counts in `in_flight` (may be null), which must outlive this.
  static Result<FileReplacement> create(const Directory& directory, io::IoEngine& engine, std::string name,
                                        InFlight* in_flight = nullptr);
  FileReplacement(FileReplacement&& other) noexcept = default;
  ~FileReplacement();
  Status write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  Status commit();

 private:
  FileReplacement(const Directory& directory, io::IoEngine& engine, std::string name, InFlight* in_flight, Fd fd)
      : directory_(&directory), engine_(&engine), in_flight_(in_flight), name_(std::move(name)), fd_(std::move(fd)) {}
  io::IoResult run(io::IoRequest request);
  const Directory* directory_;
  io::IoEngine* engine_;
  InFlight* in_flight_;
  std::string name_;
  Fd fd_;  // invalid after commit()
};

/// nullopt: there is none yet. kFormatVersion: another version (nothing was changed). kCorruption: not a whole superblock.
Result<std::optional<Superblock>> load_superblock(const Directory& directory, io::IoEngine& engine);
/// Fills format and checksum, then replaces the file durably.
Status store_superblock(const Directory& directory, io::IoEngine& engine, Superblock& superblock, InFlight* in_flight = nullptr);

}  // namespace lmcn::nvme
