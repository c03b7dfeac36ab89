// Data files as a DeviceLoader reads them: by O_DIRECT and, where there is one, by the plugin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/fork_guard.hpp"
#include "copy/gds_plugin.h"
#include "lmcn/status.hpp"

namespace lmcn {

/// How a transfer of the plugin ended.
struct GdsResult {
  Status status;
  bool lost = false;  // it failed, and the device may still write (read) the memory: nobody can tell when that ends
};

/// A reader of the plugin. Thread-safe.
class GdsReader {
 public:
  /// kUnavailable: the plugin's text.
  static Result<std::shared_ptr<GdsReader>> make(const LmcnGdsPlugin& plugin, unsigned threads, bool allow_compat);
  ~GdsReader() { plugin_.destroy(reader_); }
  GdsReader(const GdsReader&) = delete;
  GdsReader& operator=(const GdsReader&) = delete;

  Status register_memory(std::byte* base, std::uint64_t bytes);
  Result<std::uint32_t> open(int fd, bool writable);
  void close(std::uint32_t file) { plugin_.close(reader_, file); }
  struct State {
    bool compat = true;
    std::string reason;
  };
  Result<State> state(std::uint32_t file);
  bool allows_compat() const noexcept { return allow_compat_; }
  GdsResult read(std::uint32_t file, std::uint64_t offset, std::byte* to, std::uint64_t bytes);
  GdsResult write(std::uint32_t file, std::uint64_t offset, const std::byte* from, std::uint64_t bytes);

 private:
  GdsReader(const LmcnGdsPlugin& plugin, LmcnGdsReader* reader, bool allow_compat)
      : plugin_(plugin), reader_(reader), allow_compat_(allow_compat) {}

  const LmcnGdsPlugin& plugin_;
  LmcnGdsReader* const reader_;
  const bool allow_compat_;
};

/// Open for as long as somebody holds it.
class LoadFile {
 public:
  /// kNotFound, kIoError. O_DIRECT, buffered where the file system refuses that. `gds` may be null.
  static Result<std::shared_ptr<LoadFile>> open(const std::string& path, int flags, std::shared_ptr<GdsReader> gds);
  /// The same for an open file; `path` is for messages. The plugin opens it through /proc/self/fd: it need not have a name.
  static Result<std::shared_ptr<LoadFile>> adopt(std::string path, ProcessFd fd, bool writable, std::shared_ptr<GdsReader> gds);
  ~LoadFile();
  LoadFile(const LoadFile&) = delete;
  LoadFile& operator=(const LoadFile&) = delete;

  /// All of `bytes`, or kIoError. `offset`, `to` and `bytes` are multiples of 4096.
  Status read(std::uint64_t offset, std::byte* to, std::uint64_t bytes) const;
  Status write(std::uint64_t offset, const std::byte* from, std::uint64_t bytes) const;
  /// The same through the plugin.
  GdsResult gds_read(std::uint64_t offset, std::byte* to, std::uint64_t bytes) const;
  GdsResult gds_write(std::uint64_t offset, const std::byte* from, std::uint64_t bytes) const;
  /// Why the plugin does not serve this file; ok when it does. A file that would be copied through host memory is not served unless
  /// the reader allows that.
  const Status& gds_status() const noexcept { return gds_status_; }
  /// How it serves this file, as asked when it was opened.
  const GdsReader::State& gds_state() const noexcept { return gds_state_; }

  const std::string& path() const noexcept { return path_; }
  int fd() const noexcept { return fd_.get(); }
  /// Whether `path` names this file now. kNotFound: it names none.
  Result<bool> is_at_path() const;

 private:
  LoadFile(std::string path, ProcessFd fd, std::shared_ptr<GdsReader> gds);

  const std::string path_;
  const ProcessFd fd_;
  std::uint64_t device_ = 0, inode_ = 0;
  const std::shared_ptr<GdsReader> gds_;
  Status ask_gds(bool writable);
  Status gds_status_;
  GdsReader::State gds_state_;
  bool gds_open_ = false;
  std::uint32_t gds_file_ = 0;
};

/// Keeps what a transfer that got lost may still use (staging memory, the reader it is registered with, files) until the process
/// ends: to give it back would let the device write into memory of somebody else.
void keep_lost(std::vector<std::shared_ptr<const void>> held);
/// kUnavailable when that has been done so often (4 times) that it is not to grow: no GPUDirect Storage in this process any more.
Status check_lost();
/// Gives it back. REQUIRES: the transfers have ended, which a test can know.
void release_lost();

/// Files by path; each is opened once, and anew when its path names another file. Thread-safe.
class LoadFiles {
 public:
  explicit LoadFiles(std::shared_ptr<GdsReader> gds) : gds_(std::move(gds)) {}
  Result<std::shared_ptr<const LoadFile>> get(const std::string& path);

 private:
  const std::shared_ptr<GdsReader> gds_;
  std::mutex mutex_;  // of files_; not held while a file is opened or looked at
  std::map<std::string, std::shared_ptr<LoadFile>> files_;
};

}  // namespace lmcn
