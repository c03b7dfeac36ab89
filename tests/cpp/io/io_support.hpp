// Shared by the I/O tests: files on a real disk, recording sinks, and engines by name.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <latch>
#include <memory>
#include <mutex>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "io/faulty_engine.hpp"
#include "io/io_engine.hpp"

namespace lmcn::io {

inline constexpr std::uint64_t kPage = 4096;

/// Aligned memory, zeroed.
class Memory {
 public:
  explicit Memory(std::uint64_t bytes) : bytes_(bytes) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
    std::memset(data_, 0, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  std::byte* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }
  /// Words that depend on seed and position.
  void fill(std::uint64_t seed) const {
    std::uint64_t word = seed * 0xbf58476d1ce4e5b9;
    for (std::uint64_t i = 0; i + 8 <= bytes_; i += 8) {
      word = (word ^ (word >> 31)) + 0x9e3779b97f4a7c15;
      std::memcpy(data_ + i, &word, 8);
    }
  }

 private:
  std::byte* data_;
  std::uint64_t bytes_;
};

inline bool same(const std::byte* a, const std::byte* b, std::uint64_t bytes) {
  return std::memcmp(a, b, bytes) == 0;
}

class TempDir {
 public:
  TempDir() {
    const char* base = std::getenv("TMPDIR");
    std::string pattern = std::string(base != nullptr && *base != 0 ? base : "/tmp") + "/lmcn_io_XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

class File {
 public:
  explicit File(const std::string& path, int flags = O_RDWR | O_CREAT | O_DIRECT)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0600)) {
    EXPECT_GE(fd_, 0) << path << ": " << std::strerror(errno);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  int fd() const { return fd_; }
  void close() { ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

/// Keeps every result, in order of arrival.
class Recorder : public CompletionSink {
 public:
  void on_io(const IoResult& result) noexcept override {
    const std::lock_guard lock(mutex_);
    results_.push_back(result);
    changed_.notify_all();
  }
  /// Fails the test when there are not `count` within a minute.
  std::vector<IoResult> wait(std::size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::minutes(1), [&] { return results_.size() >= count; }))
        << results_.size() << " of " << count << " requests completed";
    return results_;
  }
  std::vector<IoResult> results() {
    const std::lock_guard lock(mutex_);
    return results_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<IoResult> results_;
};

/// Blocks the engine thread that delivers to it, until opened.
class Gate : public CompletionSink {
 public:
  void on_io(const IoResult&) noexcept override {
    entered_.count_down();
    open_.wait();
  }
  void wait_entered() { entered_.wait(); }
  void open() { open_.count_down(); }

 private:
  std::latch entered_{1}, open_{1};
};

inline IoRequest read_of(int fd, std::byte* data, std::uint64_t bytes, std::uint64_t offset, std::uint64_t tag = 0,
                         CompletionSink* sink = nullptr) {
  return {Op::kRead, fd, data, bytes, offset, tag, sink};
}
inline IoRequest write_of(int fd, std::byte* data, std::uint64_t bytes, std::uint64_t offset, std::uint64_t tag = 0,
                          CompletionSink* sink = nullptr) {
  return {Op::kWrite, fd, data, bytes, offset, tag, sink};
}
inline IoRequest sync_of(int fd, std::uint64_t tag = 0, CompletionSink* sink = nullptr) {
  return {Op::kSync, fd, nullptr, 0, 0, tag, sink};
}

inline std::vector<std::uint64_t> tags(const std::vector<IoResult>& results) {
  std::vector<std::uint64_t> all;
  for (const IoResult& result : results) all.push_back(result.tag);
  return all;
}

/// Returns when thread `tid` of this process sleeps in the kernel (reads /proc; allocates nothing).
inline void wait_until_asleep(pid_t tid) {
  const std::string path = "/proc/self/task/" + std::to_string(tid) + "/stat";
  char text[256] = {};
  for (;;) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t got = ::read(fd, text, sizeof text - 1);
    ::close(fd);
    if (got <= 0) return;
    text[got] = 0;
    const char* end = std::strrchr(text, ')');
    if (end != nullptr && end[2] == 'S') return;
    std::this_thread::yield();
  }
}

struct EngineCase {
  const char* name;
  EngineKind kind;
  bool faulty;
};
inline void PrintTo(const EngineCase& engine, std::ostream* out) {
  *out << engine.name;
}
inline constexpr EngineCase kUring{"io_uring", EngineKind::kIoUring, false};
inline constexpr EngineCase kThreads{"threads", EngineKind::kThreads, false};
inline constexpr EngineCase kFaultyUring{"faulty_io_uring", EngineKind::kIoUring, true};
inline constexpr EngineCase kFaultyThreads{"faulty_threads", EngineKind::kThreads, true};

/// Tests that run on every engine. Where io_uring is not to be had, its cases are reported as skipped with the reason.
class EngineTest : public ::testing::TestWithParam<EngineCase> {
 protected:
  void SetUp() override {
    start({});
    if (IsSkipped() || HasFatalFailure()) return;
    file_ = std::make_unique<File>(dir_ / "data");
    ASSERT_GE(file_->fd(), 0) << "O_DIRECT is needed: set TMPDIR to a directory on a disk";
  }

  void start(EngineOptions options) {
    engine_.reset();
    faulty_ = nullptr;
    options.kind = GetParam().kind;
    Result<std::unique_ptr<IoEngine>> made = make_engine(options);
    if (!made.ok() && made.status().code() == Code::kUnavailable) {
      GTEST_SKIP() << "NOT TESTED on " << GetParam().name << ": " << made.status().to_string();
    }
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    engine_ = std::move(made.value());
    if (!GetParam().faulty) return;
    auto faulty = std::make_unique<FaultyEngine>(std::move(engine_));
    faulty_ = faulty.get();
    engine_ = std::move(faulty);
  }
  /// One request at a time, and one thread that delivers.
  void start_serial() { start({.queue_depth = 1, .threads = 1}); }

  int fd() const { return file_->fd(); }
  IoResult run(const IoRequest& request) { return run_sync(*engine_, request); }
  void submit(const IoRequest& request) { engine_->submit({&request, 1}); }

  TempDir dir_;
  std::unique_ptr<File> file_;
  std::unique_ptr<IoEngine> engine_;
  FaultyEngine* faulty_ = nullptr;
};

inline std::string case_name(const ::testing::TestParamInfo<EngineCase>& info) {
  return info.param.name;
}

}  // namespace lmcn::io
