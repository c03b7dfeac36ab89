// Disks for the model test: an IoEngine of a few threads over files or over memory, which can be frozen and copied at any moment,
// as if the process that uses it had died there.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "io/io_engine.hpp"

namespace lmcn::model {

/// Where bytes lie. Thread-safe.
class Disk {
 public:
  virtual ~Disk() = default;
  /// Bytes moved, or -errno.
  std::int64_t perform(const io::IoRequest& request) {
    const std::shared_lock running(frozen_);
    return transfer(request);
  }
  /// Makes `to` what `from` is now; no request is under way meanwhile.
  void copy(const std::filesystem::path& from, const std::filesystem::path& to);

 protected:
  virtual std::int64_t transfer(const io::IoRequest& request) = 0;
  virtual void copy_file(const std::filesystem::path& from, const std::filesystem::path& to) = 0;

 private:
  std::shared_mutex frozen_;
};

class FileDisk final : public Disk {
  std::int64_t transfer(const io::IoRequest& request) override;
  void copy_file(const std::filesystem::path& from, const std::filesystem::path& to) override;
};

/// The files exist and have their lengths, their content is here.
class MemoryDisk final : public Disk {
  std::int64_t transfer(const io::IoRequest& request) override;
  void copy_file(const std::filesystem::path& from, const std::filesystem::path& to) override;

  std::mutex mutex_;
  std::map<ino_t, std::vector<std::byte>> content_;
};

/// Two threads that take waiting requests in any order.
class DiskEngine final : public io::IoEngine {
 public:
  DiskEngine(std::shared_ptr<Disk> disk, std::uint32_t seed);
  ~DiskEngine() override;
  void submit(std::span<const io::IoRequest> requests) override;
  Status register_buffer(std::span<std::byte>) override { return {}; }
  Status register_fd(int) override { return {}; }
  void unregister_fd(int) override {}
  std::string name() const override { return "model disk"; }

 private:
  void run();

  const std::shared_ptr<Disk> disk_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<io::IoRequest> waiting_;
  std::minstd_rand random_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace lmcn::model
