#include "model/disk_engine.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "io/transfer.hpp"

namespace lmcn::model {

void Disk::copy(const std::filesystem::path& from, const std::filesystem::path& to) {
  const std::unique_lock frozen(frozen_);
  std::filesystem::create_directory(to);
  std::filesystem::permissions(to, std::filesystem::perms::owner_all);
  // By name: an iterator might meet a file that is renamed meanwhile twice, or never.
  for (const char* name : {"superblock", "index.ckpt", "data.000"}) {
    if (std::filesystem::exists(from / name)) copy_file(from / name, to / name);
  }
}

std::int64_t FileDisk::transfer(const io::IoRequest& request) {
  ssize_t n = 0;
  if (request.op == io::Op::kRead) n = ::pread(request.fd, request.data, request.bytes, static_cast<off_t>(request.offset));
  if (request.op == io::Op::kWrite) n = ::pwrite(request.fd, request.data, request.bytes, static_cast<off_t>(request.offset));
  if (request.op == io::Op::kSync) n = ::fdatasync(request.fd);
  return n < 0 ? -errno : n;
}

void FileDisk::copy_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::filesystem::copy_file(from, to);
}

std::int64_t MemoryDisk::transfer(const io::IoRequest& request) {
  struct stat found{};
  if (::fstat(request.fd, &found) != 0) return -errno;
  const std::lock_guard lock(mutex_);
  std::vector<std::byte>& content = content_[found.st_ino];
  const auto end = request.offset + request.bytes;
  if (request.op == io::Op::kWrite) {
    if (end > static_cast<std::uint64_t>(found.st_size) && ::ftruncate(request.fd, static_cast<off_t>(end)) != 0) return -errno;
    if (end > content.size()) content.resize(end);
    std::memcpy(content.data() + request.offset, request.data, request.bytes);
  } else if (request.op == io::Op::kRead) {
    const auto length = static_cast<std::uint64_t>(found.st_size);
    if (request.offset >= length) return 0;
    const std::uint64_t bytes = std::min(request.bytes, length - request.offset);
    if (content.size() < request.offset + bytes) content.resize(request.offset + bytes);
    std::memcpy(request.data, content.data() + request.offset, bytes);
    return static_cast<std::int64_t>(bytes);
  }
  return request.op == io::Op::kSync ? 0 : static_cast<std::int64_t>(request.bytes);
}

void MemoryDisk::copy_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  struct stat old_file{};
  struct stat new_file{};
  const int fd = ::open(to.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0 || ::stat(from.c_str(), &old_file) != 0 || ::ftruncate(fd, old_file.st_size) != 0 || ::fstat(fd, &new_file) != 0) {
    throw std::system_error(errno, std::generic_category(), "copy to " + to.string());
  }
  ::close(fd);
  const std::lock_guard lock(mutex_);
  content_[new_file.st_ino] = content_[old_file.st_ino];
}

DiskEngine::DiskEngine(std::shared_ptr<Disk> disk, std::uint32_t seed) : disk_(std::move(disk)), random_(seed) {
  for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { run(); });
}

DiskEngine::~DiskEngine() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void DiskEngine::submit(std::span<const io::IoRequest> requests) {
  {
    const std::lock_guard lock(mutex_);
    waiting_.insert(waiting_.end(), requests.begin(), requests.end());
  }
  wake_.notify_all();
}

void DiskEngine::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    const bool cancel = stop_;
    const auto chosen = waiting_.begin() + static_cast<std::ptrdiff_t>(random_() % waiting_.size());
    const io::IoRequest request = *chosen;
    waiting_.erase(chosen);
    lock.unlock();
    io::Transfer transfer(request);
    if (cancel) {
      transfer.fail(ECANCELED);
    } else {
      io::IoRequest piece = request;
      do {
        piece.data = transfer.data();
        piece.bytes = request.op == io::Op::kSync ? 0 : transfer.bytes();
        piece.offset = transfer.offset();
      } while (!transfer.advance(disk_->perform(piece)));
    }
    request.sink->on_io(transfer.result());
    lock.lock();
  }
}

}  // namespace lmcn::model
