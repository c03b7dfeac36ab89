// Sits between log and device: notes headers and footers in the ledger, and ends the process at a chosen event.
#pragma once

#include <atomic>
#include <memory>

#include "io/io_engine.hpp"
#include "ledger.hpp"

namespace lmcn::crash {

/// SIGKILL of this process at event ledger.kill_at; in the middle of the write if that event is one. Thread-safe.
class WitnessEngine final : public io::IoEngine {
 public:
  WitnessEngine(std::unique_ptr<io::IoEngine> inner, Ledger& ledger) : ledger_(ledger), inner_(std::move(inner)) {}

  void submit(std::span<const io::IoRequest> requests) override;
  Status register_buffer(std::span<std::byte> buffer) override { return inner_->register_buffer(buffer); }
  Status register_fd(int fd) override {
    data_fd_ = fd;  // the log registers its data file, nothing else
    return inner_->register_fd(fd);
  }
  void unregister_fd(int fd) override { inner_->unregister_fd(fd); }
  std::string name() const override { return "witness(" + inner_->name() + ")"; }

 private:
  struct Flight;
  bool count_event();  // true: the process must die here
  void die_during(const io::IoRequest& request);
  void note_header(const io::IoRequest& request);
  void note_written(const io::IoRequest& request);

  Ledger& ledger_;
  std::atomic<int> data_fd_{-1};
  std::unique_ptr<io::IoEngine> inner_;  // last: its destructor runs completions
};

}  // namespace lmcn::crash
