#include "copy/device_load_files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

namespace lmcn {
namespace {

/// Room for a text of the plugin, and the Status it makes.
class PluginError {
 public:
  operator LmcnGdsError() noexcept { return {text_.data(), text_.size()}; }  // NOLINT(google-explicit-constructor)
  Status status(int result, Code code, const std::string& what) const {
    if (result == 0) return {};
    return {code, what + (text_[0] != '\0' ? text_.data() : "the plugin gave no reason")};
  }

 private:
  std::array<char, 512> text_{};
};

Status cannot_open(const std::string& path) {
  return Status::from_errno(errno, "open " + path, errno == ENOENT ? Code::kNotFound : Code::kIoError);
}

constexpr std::size_t kMaxLost = 4;

struct Lost {
  std::mutex mutex;
  std::vector<std::vector<std::shared_ptr<const void>>> held;
};
Lost& lost() {
  static Lost& lost = *new Lost;  // not destroyed at exit either
  return lost;
}

}  // namespace

void keep_lost(std::vector<std::shared_ptr<const void>> held) {
  std::lock_guard lock(lost().mutex);
  lost().held.push_back(std::move(held));
}

Status check_lost() {
  std::lock_guard lock(lost().mutex);
  if (lost().held.size() < kMaxLost) return {};
  return {Code::kUnavailable, "GPUDirect Storage: its reads failed in " + std::to_string(lost().held.size()) +
                                  " loaders of this process without provably ending, and their memory cannot be given back"};
}

void release_lost() {
  std::lock_guard lock(lost().mutex);
  lost().held.clear();
}

Result<std::shared_ptr<GdsReader>> GdsReader::make(const LmcnGdsPlugin& plugin, unsigned threads, bool allow_compat) {
  const LmcnGdsOptions options{threads, allow_compat ? 1u : 0u};
  LmcnGdsReader* reader = nullptr;
  PluginError error;
  if (Status status = error.status(plugin.make(&options, &reader, error), Code::kUnavailable, "GPUDirect Storage: ");
      !status.ok()) {
    return status;
  }
  return std::shared_ptr<GdsReader>(new GdsReader(plugin, reader, allow_compat));
}

Status GdsReader::register_memory(std::byte* base, std::uint64_t bytes) {
  PluginError error;
  return error.status(plugin_.register_memory(reader_, base, bytes, error), Code::kUnavailable,
                      "registering " + std::to_string(bytes) + " bytes of staging memory: ");
}

Result<std::uint32_t> GdsReader::open(int fd, bool writable) {
  PluginError error;
  std::uint32_t file = 0;
  if (Status status = error.status(plugin_.open(reader_, fd, writable ? 1 : 0, &file, error), Code::kUnavailable, "");
      !status.ok()) {
    return status;
  }
  return file;
}

Result<GdsReader::State> GdsReader::state(std::uint32_t file) {
  PluginError error;
  LmcnGdsState state{};
  if (Status status = error.status(plugin_.state(reader_, file, &state, error), Code::kUnavailable, ""); !status.ok())
    return status;
  return State{state.compat != 0, state.reason};
}

GdsResult GdsReader::read(std::uint32_t file, std::uint64_t offset, std::byte* to, std::uint64_t bytes) {
  PluginError error;
  const int result = plugin_.read(reader_, file, offset, to, bytes, error);
  return {error.status(result, Code::kIoError, ""), result != LMCN_GDS_OK && result != LMCN_GDS_FAILED};
}

GdsResult GdsReader::write(std::uint32_t file, std::uint64_t offset, const std::byte* from, std::uint64_t bytes) {
  PluginError error;
  const int result = plugin_.write(reader_, file, offset, from, bytes, error);
  return {error.status(result, Code::kIoError, ""), result != LMCN_GDS_OK && result != LMCN_GDS_FAILED};
}

Result<std::shared_ptr<LoadFile>> LoadFile::open(const std::string& path, int flags, std::shared_ptr<GdsReader> gds) {
  const auto opened = [&](int more) {
    return ProcessFd::opened([&] { return ::open(path.c_str(), flags | more | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR); });
  };
  ProcessFd fd = opened(O_DIRECT);
  if (!fd.valid() && (errno == EINVAL || errno == EOPNOTSUPP)) fd = opened(0);
  if (!fd.valid()) return cannot_open(path);
  return adopt(path, std::move(fd), (flags & O_ACCMODE) != O_RDONLY, std::move(gds));
}

Result<std::shared_ptr<LoadFile>> LoadFile::adopt(std::string path, ProcessFd fd, bool writable, std::shared_ptr<GdsReader> gds) {
  struct stat found{};
  if (::fstat(fd.get(), &found) != 0) return Status::from_errno(errno, "fstat " + path);
  if (!S_ISREG(found.st_mode)) return Status(Code::kIoError, path + " is not a regular file");
  std::shared_ptr<LoadFile> file(new LoadFile(std::move(path), std::move(fd), std::move(gds)));
  file->device_ = found.st_dev;
  file->inode_ = found.st_ino;
  file->gds_status_ = file->gds_ ? file->ask_gds(writable) : Status(Code::kUnavailable, "no plugin");
  return file;
}

Status LoadFile::ask_gds(bool writable) {
  Result<std::uint32_t> opened = gds_->open(fd_.get(), writable);
  if (!opened.ok()) return opened.status();
  gds_file_ = *opened;
  gds_open_ = true;
  Result<GdsReader::State> state = gds_->state(gds_file_);
  if (!state.ok()) return state.status();
  gds_state_ = std::move(state).value();
  if (gds_state_.compat && !gds_->allows_compat()) return {Code::kUnavailable, gds_state_.reason};
  return {};
}

LoadFile::LoadFile(std::string path, ProcessFd fd, std::shared_ptr<GdsReader> gds)
    : path_(std::move(path)), fd_(std::move(fd)), gds_(std::move(gds)) {}

LoadFile::~LoadFile() {
  if (gds_open_) gds_->close(gds_file_);
}

Status LoadFile::read(std::uint64_t offset, std::byte* to, std::uint64_t bytes) const {
  for (std::uint64_t done = 0; done < bytes;) {
    const ssize_t n = ::pread(fd_.get(), to + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::from_errno(errno, "pread " + path_);
    if (n == 0) {
      return {Code::kIoError, "pread " + path_ + ": it ends at byte " + std::to_string(offset + done) + ", " +
                                  std::to_string(bytes - done) + " more were expected"};
    }
    done += static_cast<std::uint64_t>(n);
  }
  return {};
}

Status LoadFile::write(std::uint64_t offset, const std::byte* from, std::uint64_t bytes) const {
  for (std::uint64_t done = 0; done < bytes;) {
    const ssize_t n = ::pwrite(fd_.get(), from + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Status::from_errno(n < 0 ? errno : ENOSPC, "pwrite " + path_);
    done += static_cast<std::uint64_t>(n);
  }
  return {};
}

GdsResult LoadFile::gds_read(std::uint64_t offset, std::byte* to, std::uint64_t bytes) const {
  if (!gds_status_.ok()) return {gds_status_};
  // Beforehand: of a read that fails halfway nobody knows when it ends.
  struct stat found{};
  if (::fstat(fd_.get(), &found) != 0) return {Status::from_errno(errno, "fstat " + path_)};
  if (static_cast<std::uint64_t>(found.st_size) < offset + bytes) {
    return {{Code::kIoError, path_ + ": it ends at byte " + std::to_string(found.st_size) + ", " +
                                 std::to_string(offset + bytes - static_cast<std::uint64_t>(found.st_size)) +
                                 " more were expected"}};
  }
  return gds_->read(gds_file_, offset, to, bytes);
}

GdsResult LoadFile::gds_write(std::uint64_t offset, const std::byte* from, std::uint64_t bytes) const {
  if (!gds_status_.ok()) return {gds_status_};
  return gds_->write(gds_file_, offset, from, bytes);
}

Result<bool> LoadFile::is_at_path() const {
  struct stat found{};
  if (::stat(path_.c_str(), &found) != 0) return cannot_open(path_);
  return found.st_dev == device_ && found.st_ino == inode_;
}

Result<std::shared_ptr<const LoadFile>> LoadFiles::get(const std::string& path) {
  std::shared_ptr<LoadFile> known;
  {
    std::lock_guard lock(mutex_);
    if (const auto found = files_.find(path); found != files_.end()) known = found->second;
  }
  if (known) {
    Result<bool> same = known->is_at_path();
    if (same.ok() && *same) return std::shared_ptr<const LoadFile>(std::move(known));
    std::lock_guard lock(mutex_);
    if (const auto found = files_.find(path); found != files_.end() && found->second == known) files_.erase(found);
    if (!same.ok()) return same.status();
  }
  Result<std::shared_ptr<LoadFile>> opened = LoadFile::open(path, O_RDONLY, gds_);
  if (!opened.ok()) return opened.status();
  std::lock_guard lock(mutex_);
  files_.insert_or_assign(path, *opened);
  return std::shared_ptr<const LoadFile>(*opened);
}

}  // namespace lmcn
