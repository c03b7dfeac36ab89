#include "io/thread_pool_engine.hpp"

#include <unistd.h>

#include <system_error>

#include "io/engine_thread.hpp"
#include "io/transfer.hpp"

namespace lmcn::io {
namespace {

std::int64_t call_kernel(const Transfer& transfer) noexcept {
  const IoRequest& request = transfer.request();
  ssize_t answer = -1;
  switch (request.op) {
    case Op::kRead:
      answer = ::pread(request.fd, transfer.data(), transfer.bytes(), static_cast<off_t>(transfer.offset()));
      break;
    case Op::kWrite:
      answer = ::pwrite(request.fd, transfer.data(), transfer.bytes(), static_cast<off_t>(transfer.offset()));
      break;
    case Op::kSync:
      answer = ::fdatasync(request.fd);
      break;
  }
  return answer < 0 ? -static_cast<std::int64_t>(errno) : answer;
}

IoResult perform(const IoRequest& request) noexcept {
  Transfer transfer(request);
  while (!transfer.advance(call_kernel(transfer))) {
    if (transfer.interrupted()) std::this_thread::yield();
  }
  return transfer.result();
}

}  // namespace

Result<std::unique_ptr<IoEngine>> ThreadPoolEngine::create(const EngineOptions& options) {
  std::unique_ptr<ThreadPoolEngine> engine(new ThreadPoolEngine(options));
  try {
    for (unsigned i = 0; i < options.threads; ++i) {
      engine->threads_.push_back(start_engine_thread("lmcn-io-" + std::to_string(i), [e = engine.get()] { e->run(); }));
    }
  } catch (const std::system_error& error) {
    return Status(Code::kResourceExhausted, "I/O threads = " + std::to_string(options.threads) + ": " + error.what(),
                  error.code().value());
  }
  return std::unique_ptr<IoEngine>(std::move(engine));
}

ThreadPoolEngine::~ThreadPoolEngine() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPoolEngine::submit(std::span<const IoRequest> requests) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push(requests);
  }
  if (requests.size() == 1) {
    wake_.notify_one();
  } else {
    wake_.notify_all();
  }
}

// A thread leaves only when stop_ is set and nothing waits. What waits at that point is cancelled, not started; a sink that
// submits while the engine stops does so from one of these threads, which then looks at the queue again before it leaves.
void ThreadPoolEngine::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    IoRequest request;
    if (stop_) {
      if (!queue_.cancel(request)) return;
      lock.unlock();
      request.sink->on_io(unstarted_result(request, ECANCELED));
      lock.lock();
    } else if (queue_.start(request)) {
      lock.unlock();
      const IoResult result = perform(request);
      lock.lock();
      queue_.finish();
      const bool another = queue_.can_start();
      lock.unlock();
      if (another) wake_.notify_one();
      request.sink->on_io(result);
      lock.lock();
    } else {
      wake_.wait(lock);
    }
  }
}

}  // namespace lmcn::io
