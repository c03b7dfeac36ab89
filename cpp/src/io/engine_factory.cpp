#include <sys/utsname.h>

#include <condition_variable>
#include <cstdlib>
#include <mutex>

#include "io/io_engine.hpp"
#include "io/thread_pool_engine.hpp"
#include "io/uring_engine.hpp"

namespace lmcn::io {
namespace {

constexpr const char* kVariable = "LMCN_IO_ENGINE";
constexpr unsigned kMaxQueueDepth = 4096;
constexpr unsigned kMaxThreads = 256;

std::string kernel_release() {
  utsname names{};
  return ::uname(&names) == 0 ? names.release : "unknown";
}

Status check_range(const char* field, unsigned value, unsigned most) {
  if (value >= 1 && value <= most) return {};
  return Status(Code::kInvalidArgument,
                std::string(field) + " = " + std::to_string(value) + ": expected 1.." + std::to_string(most));
}

class WaitingSink final : public CompletionSink {
 public:
  void on_io(const IoResult& result) noexcept override {
    const std::lock_guard lock(mutex_);
    result_ = result;
    done_ = true;
    wake_.notify_one();  // under the lock: the waiter destroys this as soon as it can take it
  }
  IoResult wait() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return done_; });
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  IoResult result_;
  bool done_ = false;
};

}  // namespace

Status IoResult::status(std::string_view what) const {
  const std::string text = std::string(what) + " (" + std::to_string(actual) + " of " + std::to_string(expected) + " bytes)";
  if (error == ECANCELED) return Status::from_errno(error, text, Code::kAborted);
  if (error != 0) return Status::from_errno(error, text);
  if (actual < expected) return Status(Code::kIoError, text + ": short, at the end of the file or of what the device gave");
  if (actual > expected) return Status(Code::kInternal, text + ": more than asked for");
  return {};
}

Result<EngineKind> parse_engine_kind(std::string_view text) {
  if (text == "auto") return EngineKind::kAuto;
  if (text == "io_uring") return EngineKind::kIoUring;
  if (text == "threads") return EngineKind::kThreads;
  return Status(Code::kInvalidArgument, "I/O engine \"" + std::string(text) + "\": expected auto, io_uring or threads");
}

Result<std::unique_ptr<IoEngine>> make_engine(const EngineOptions& options, std::string* why) {
  LMCN_RETURN_IF_ERROR(check_range("queue_depth", options.queue_depth, kMaxQueueDepth));
  LMCN_RETURN_IF_ERROR(check_range("threads", options.threads, kMaxThreads));
  EngineKind kind = options.kind;
  std::string asked_by = "asked for";
  if (const char* text = std::getenv(kVariable); kind == EngineKind::kAuto && text != nullptr) {
    const Result<EngineKind> parsed = parse_engine_kind(text);
    if (!parsed.ok()) return Status(Code::kInvalidArgument, std::string(kVariable) + ": " + parsed.status().message());
    kind = parsed.value();
    if (kind != EngineKind::kAuto) asked_by = std::string(kVariable) + "=" + text;
  }

  const std::string with_threads = "threads (" + std::to_string(options.threads) + "): ";
  std::string reason = with_threads + asked_by;
  if (kind != EngineKind::kThreads) {
    std::string mode;
    Result<std::unique_ptr<IoEngine>> engine = UringEngine::create(options, &mode);
    if (engine.ok()) {
      const bool asked = kind == EngineKind::kIoUring;
      if (why != nullptr) {
        *why = "io_uring (" + mode + ", queue depth " + std::to_string(options.queue_depth) +
               "): " + (asked ? asked_by : "works here") + ", Linux " + kernel_release();
      }
      return engine;
    }
    if (kind == EngineKind::kIoUring) {
      return Status(Code::kUnavailable, "I/O engine io_uring (" + asked_by + "): " + engine.status().message(),
                    engine.status().sys_errno());
    }
    reason = with_threads + "no io_uring here: " + engine.status().message();
  }
  Result<std::unique_ptr<IoEngine>> engine = ThreadPoolEngine::create(options);
  if (engine.ok() && why != nullptr) *why = reason;
  return engine;
}

IoResult run_sync(IoEngine& engine, IoRequest request) {
  WaitingSink sink;
  request.sink = &sink;
  engine.submit({&request, 1});
  return sink.wait();
}

}  // namespace lmcn::io
