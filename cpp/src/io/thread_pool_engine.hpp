// The engine that works everywhere: threads and pread/pwrite/fdatasync.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/io_engine.hpp"
#include "io/request_queue.hpp"

namespace lmcn::io {

/// At most min(threads, queue_depth) requests are at the device. Sinks run on the thread that did the I/O, so several at once.
class ThreadPoolEngine final : public IoEngine {
 public:
  /// REQUIRES: options were checked by make_engine().
  static Result<std::unique_ptr<IoEngine>> create(const EngineOptions& options);
  ~ThreadPoolEngine() override;

  void submit(std::span<const IoRequest> requests) override;
  Status register_buffer(std::span<std::byte>) override { return {}; }
  Status register_fd(int) override { return {}; }
  void unregister_fd(int) override {}
  std::string name() const override { return "threads"; }

 private:
  explicit ThreadPoolEngine(const EngineOptions& options) : queue_(options.queue_depth) {}
  void run();

  std::mutex mutex_;  // guards queue_ and stop_; never held during I/O or a sink
  std::condition_variable wake_;
  RequestQueue queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace lmcn::io
