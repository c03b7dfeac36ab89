// A runtime directory of the test's own, an arena, an owner, workers in this process and in others.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"
#include "child_process.hpp"
#include "lmcn/attach.hpp"

namespace lmcn {

using namespace std::chrono_literals;

/// An environment variable for the length of a scope.
class ScopedEnv {
 public:
  ScopedEnv(std::string name, const std::optional<std::string>& value) : name_(std::move(name)) {
    if (const char* before = std::getenv(name_.c_str())) before_ = before;
    set(value);
  }
  ScopedEnv(const ScopedEnv&) = delete;
  ScopedEnv& operator=(const ScopedEnv&) = delete;
  ~ScopedEnv() { set(before_); }

 private:
  void set(const std::optional<std::string>& value) const {
    if (value) {
      ::setenv(name_.c_str(), value->c_str(), 1);
    } else {
      ::unsetenv(name_.c_str());
    }
  }
  std::string name_;
  std::optional<std::string> before_;
};

/// A fresh directory, short enough for socket paths.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    char name[] = "/tmp/lmcn_test_XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// A worker that speaks for itself. Blocks while the owner's queue is full.
inline UniqueFd connect_raw(const std::string& path) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  const wire::Address address = wire::address_of(path);
  EXPECT_EQ(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length), 0);
  return socket;
}

class AttachTest : public ::testing::Test {
 public:
  static constexpr std::uint64_t kArenaBytes = 4ull << 20;
  static constexpr std::uint64_t kRankBytes = 65536;

 protected:
  AttachTest() : environment_("LMCN_RUNTIME_DIR", scratch_.path() + "/run") {
    auto arena = HostArena::create({.bytes = kArenaBytes, .populate_threads = 0});
    EXPECT_TRUE(arena.ok()) << arena.status().to_string();
    if (arena.ok()) arena_ = std::move(*arena);
  }

  ArenaHandle handle(std::uint32_t ranks = 4) const {
    return {kArenaBytes, kRankBytes, ranks, static_cast<std::uint32_t>(::getpid())};
  }

  Result<std::unique_ptr<RendezvousOwner>> listen(const std::string& engine, std::uint32_t ranks = 4) {
    return RendezvousOwner::listen(engine, arena_->memfd(), handle(ranks), [this](std::uint32_t rank) {
      const std::lock_guard lock(mutex_);
      gone_.push_back(rank);
      changed_.notify_all();
    });
  }
  std::unique_ptr<RendezvousOwner> serve(const std::string& engine, std::uint32_t ranks = 4) {
    auto owner = listen(engine, ranks);
    EXPECT_TRUE(owner.ok()) << owner.status().to_string();
    return owner.ok() ? std::move(*owner) : nullptr;
  }
  static Result<std::unique_ptr<RendezvousClient>> attach(const std::string& engine, std::uint32_t rank,
                                                          std::chrono::milliseconds deadline = 10s) {
    return RendezvousClient::attach(engine, rank, kRankBytes, deadline);
  }
  /// Waits until `count` workers went; which.
  std::vector<std::uint32_t> wait_gone(std::size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, 20s, [&] { return gone_.size() >= count; }));
    return gone_;
  }

  ScratchDirectory scratch_;
  ScopedEnv environment_;
  std::unique_ptr<HostArena> arena_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::uint32_t> gone_;
};

}  // namespace lmcn
