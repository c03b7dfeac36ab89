// Asynchronous file I/O behind one interface: io_uring, a thread pool, and a fault-injecting wrapper for tests.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "lmcn/status.hpp"

namespace lmcn::io {

/// kSync: fdatasync; covers the writes that had completed when it was submitted (`bytes` and `offset` are ignored).
enum class Op : std::uint8_t { kRead, kWrite, kSync };

/// What happened to one request. The only place where short I/O is judged is status(): every engine retries a short
/// read or write to completion first, so actual < expected with error 0 means end of file or a device that stopped early.
struct IoResult {
  std::uint64_t tag = 0;       // the request's
  std::uint64_t expected = 0;  // bytes asked for
  std::uint64_t actual = 0;    // bytes moved
  int error = 0;               // errno, 0 if none
  /// ok only when error == 0 and actual == expected. kAborted for ECANCELED, else kIoError; the message names `what`, the
  /// bytes moved and the bytes asked for.
  Status status(std::string_view what) const;
};

/// Receives completions. on_io runs on an engine thread: it must not block on I/O of the same engine; it may submit. Later
/// completions wait behind it, so long work belongs elsewhere.
class CompletionSink {
 public:
  virtual void on_io(const IoResult& result) noexcept = 0;

 protected:
  ~CompletionSink() = default;
};

struct IoRequest {
  Op op = Op::kRead;
  int fd = -1;                // open descriptor; stays open until the completion
  std::byte* data = nullptr;  // O_DIRECT descriptors: 4096-aligned, as are bytes and offset
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  std::uint64_t tag = 0;
  CompletionSink* sink = nullptr;  // not null; must outlive the completion
};

/// Thread-safe. Every accepted request completes exactly once, through its sink, also when the engine is destroyed
/// (the destructor waits for what is in flight; queued requests that never started complete with ECANCELED).
class IoEngine {
 public:
  virtual ~IoEngine() = default;

  /// Never blocks on the device. Requests beyond the queue depth wait inside the engine, in order, reads before writes.
  virtual void submit(std::span<const IoRequest> requests) = 0;

  /// Hints: memory and descriptors that will be used often (io_uring registered buffers and files). A failure to register
  /// (limits) is not an error of I/O: the requests work unregistered. register_buffer may be called for consecutive parts
  /// of one area. Registered memory is pinned where it is (populate and collapse it before) and must stay mapped for as long
  /// as the engine lives. unregister_fd must be called before the descriptor is closed. These three may wait for an on_io
  /// under way: call them without locks that sinks take.
  virtual Status register_buffer(std::span<std::byte> buffer) = 0;
  virtual Status register_fd(int fd) = 0;
  virtual void unregister_fd(int fd) = 0;

  /// "io_uring" | "threads" | "faulty(io_uring)" ...
  virtual std::string name() const = 0;
};

enum class EngineKind : std::uint8_t { kAuto, kIoUring, kThreads };

struct EngineOptions {
  EngineKind kind = EngineKind::kAuto;
  unsigned queue_depth = 32;  // requests at the device at once
  unsigned threads = 4;       // thread-pool engine only
};

/// Parses "auto" | "io_uring" | "threads".
Result<EngineKind> parse_engine_kind(std::string_view text);

/// kAuto: io_uring when a real ring works here (set up, one no-op), else threads. The environment variable LMCN_IO_ENGINE
/// overrides kAuto. `why` (optional) receives one line that names the choice and its reason, for the log.
/// kIoUring where no ring can be had: kUnavailable.
Result<std::unique_ptr<IoEngine>> make_engine(const EngineOptions& options, std::string* why = nullptr);

/// Convenience for cold paths (open, checkpoint, tests): submits one request and waits for it.
IoResult run_sync(IoEngine& engine, IoRequest request);

}  // namespace lmcn::io
