// Every connection is answered or closed, whatever other peers do and whatever the owner's process runs out of.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <latch>
#include <thread>

#include "attach_fixture.hpp"

namespace lmcn {
namespace {

using OwnerAnswers = AttachTest;

wire::Hello hello_of(std::uint32_t rank, std::uint64_t rank_bytes) {
  wire::Hello hello;
  hello.rank = rank;
  hello.rank_bytes = rank_bytes;
  return hello;
}

bool limit_descriptors(rlim_t soft) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
  limit.rlim_cur = soft;
  return ::setrlimit(RLIMIT_NOFILE, &limit) == 0;
}

// UBSan makes a pipe to look at an object whose type it has not seen yet: a few low numbers for that where a test has no others.
std::vector<UniqueFd> some_descriptors() {
  std::vector<UniqueFd> some;
  for (int i = 0; i < 4; ++i) some.emplace_back(::eventfd(0, EFD_CLOEXEC));
  return some;
}

// What the owner says, or its end; blocks.
Status reply_on(int socket) {
  pollfd event{socket, POLLIN, 0};
  while (::poll(&event, 1, -1) < 0 && errno == EINTR) {
  }
  wire::Reply reply;
  UniqueFd memfd;
  LMCN_RETURN_IF_ERROR(wire::receive_reply(socket, reply, memfd));
  return wire::status_of(reply);
}

// All that this process may still have. Empty: it did not come to the limit.
std::vector<UniqueFd> all_descriptors() {
  std::vector<UniqueFd> all;
  do {
    all.emplace_back(::eventfd(0, EFD_CLOEXEC));
  } while (all.back().valid());
  const int error = errno;
  all.pop_back();
  if (error != EMFILE) all.clear();
  return all;
}

// Greets on a connection, and says whether the owner, this process, refused it and named the cause.
bool refused_for_want_of_descriptors(int socket, std::uint64_t rank_bytes) {
  (void)wire::send_hello(socket, hello_of(0, rank_bytes));  // refused before or after
  const Status status = reply_on(socket);
  if (status.code() == Code::kUnavailable && status.message().find("Too many open files") != std::string::npos &&
      status.message().find(std::to_string(::getpid())) != std::string::npos) {
    return true;
  }
  std::fprintf(stderr, "%s\n", status.to_string().c_str());
  return false;
}

// Blocks until the owner has closed it.
bool ends(int socket) {
  char byte;
  ssize_t bytes;
  while ((bytes = ::recv(socket, &byte, 1, 0)) < 0 && errno == EINTR) {
  }
  return bytes == 0;
}

TEST_F(OwnerAnswers, WithMoreOpenThanTheLimitAllows) {
  const pid_t child = run_in_child([this] {
    std::vector<UniqueFd> low = some_descriptors();
    auto owner = listen("engine");
    if (!owner.ok()) return 1;
    rlimit before{};
    if (::getrlimit(RLIMIT_NOFILE, &before) != 0) return 2;
    auto worker = attach("engine", 0);
    if (!worker.ok()) return 3;
    std::vector<UniqueFd> silent;
    for (int i = 0; i < 20; ++i) silent.push_back(connect_raw((*owner)->path()));
    if (!attach("engine", 1).ok()) return 4;  // so the silent ones, which came before it, have been accepted
    if (!limit_descriptors(16)) return 5;
    low.clear();
    *worker = nullptr;
    if (wait_gone(2).size() != 2) return 9;
    for (const UniqueFd& socket : silent) {
      if (!ends(socket.get())) return 6;
    }
    if (!limit_descriptors(before.rlim_cur) || !attach("engine", 0).ok()) return 7;
    const UniqueFd last = connect_raw((*owner)->path());
#ifndef __SANITIZE_ADDRESS__  // UBSan comes with it
    if (!limit_descriptors(0)) return 8;
#endif
    owner->reset();  // ends its thread
    return 0;
  });
  EXPECT_EQ(exit_status(child), 0);
}

TEST_F(OwnerAnswers, WithoutAFreeDescriptorSayingSo) {
  const pid_t child = run_in_child([this] {
    auto owner = listen("engine");
    if (!owner.ok() || !limit_descriptors(128)) return 1;
    const std::string path = (*owner)->path();
    std::vector<UniqueFd> clients;
    for (int i = 0; i < 8; ++i) clients.emplace_back(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    std::vector<UniqueFd> all = all_descriptors();
    if (all.empty()) return 2;
    const wire::Address address = wire::address_of(path);
    for (const UniqueFd& client : clients) {
      if (::connect(client.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) return 3;
      if (!refused_for_want_of_descriptors(client.get(), kRankBytes)) return 4;
    }
    all.clear();
    return attach("engine", 0).ok() ? 0 : 5;
  });
  EXPECT_EQ(exit_status(child), 0);
}

// Accepted with the last one, a worker would be gone for the owner 500 ms after its socket's end, whatever its process still
// copies.
TEST_F(OwnerAnswers, WithoutADescriptorForTheWorkersProcessSayingSo) {
  const pid_t child = run_in_child([this] {
    auto owner = listen("engine");
    if (!owner.ok() || !limit_descriptors(128)) return 1;
    const wire::Address address = wire::address_of((*owner)->path());
    const UniqueFd client(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    std::vector<UniqueFd> all = all_descriptors();
    if (all.size() < 2) return 2;
    all.pop_back();  // for the connection
    if (::connect(client.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) return 3;
    if (!refused_for_want_of_descriptors(client.get(), kRankBytes)) return 4;
    all.clear();
    return attach("engine", 0).ok() ? 0 : 5;
  });
  EXPECT_EQ(exit_status(child), 0);
}

TEST_F(OwnerAnswers, ARefusalIsReadThoughTheHelloWasNot) {
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd worker(ends[0]);
  UniqueFd owner(ends[1]);
  ASSERT_TRUE(wire::send_hello(worker.get(), hello_of(0, kRankBytes)).ok());
  ASSERT_TRUE(wire::send_reply(owner.get(), wire::refusal({Code::kInvalidArgument, "not you"}), -1).ok());
  owner.reset();
  wire::Reply reply;
  UniqueFd memfd;
  const Status received = wire::receive_reply(worker.get(), reply, memfd);
  ASSERT_TRUE(received.ok()) << received.to_string();
  EXPECT_EQ(wire::status_of(reply).message(), "not you");
  EXPECT_EQ(wire::receive_reply(worker.get(), reply, memfd).code(), Code::kUnavailable);
}

TEST_F(OwnerAnswers, WhileMoreConnectThanCanWait) {
  std::latch busy(1);
  std::latch go_on(1);
  auto owner = RendezvousOwner::listen("engine", arena_->memfd(), handle(), [&](std::uint32_t rank) {
    if (rank != 0) return;
    busy.count_down();
    go_on.wait();
  });
  ASSERT_TRUE(owner.ok()) << owner.status().to_string();
  ASSERT_TRUE(attach("engine", 0).ok());
  busy.wait();  // from here on the owner's thread accepts nothing
  constexpr std::size_t kQueue = 128;
  std::vector<UniqueFd> silent;
  for (std::size_t i = 0; i < kQueue; ++i) silent.push_back(connect_raw((*owner)->path()));
  std::latch trying(1);
  std::jthread worker([&] {
    trying.count_down();
    const auto client = attach("engine", 1, 60s);
    EXPECT_TRUE(client.ok()) << client.status().to_string();
  });
  trying.wait();
  go_on.count_down();
  worker.join();
  for (const UniqueFd& socket : silent) EXPECT_TRUE(ends(socket.get()));
  owner->reset();
}

// An owner on a machine so slow that a worker asks again before it is answered.
TEST_F(OwnerAnswers, ThoughSlowerThanAWorkerFirstWaits) {
  ASSERT_TRUE(runtime_directory().ok());
  const auto path = socket_path("engine");
  ASSERT_TRUE(path.ok());
  const wire::Address address = wire::address_of(*path);
  const UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length), 0);
  ASSERT_EQ(::listen(listener.get(), 8), 0);
  std::jthread slow([&] {
    for (bool answered = false; !answered;) {
      const UniqueFd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!socket.valid()) return;
      pollfd end{socket.get(), 0, 0};
      if (::poll(&end, 1, 1500) != 0) continue;  // the worker has gone
      wire::Reply reply;
      reply.arena_bytes = kArenaBytes;
      answered = wire::send_reply(socket.get(), reply, arena_->memfd()).ok();
    }
  });
  const auto client = attach("engine", 0, 60s);
  EXPECT_TRUE(client.ok()) << client.status().to_string();
  ::shutdown(listener.get(), SHUT_RDWR);  // ends accept()
}

// Connects for as long as the owner lives, from more threads than there are processors to accept on.
TEST_F(OwnerAnswers, WhileOthersConnectWithoutEnd) {
  auto owner = serve("engine");
  const std::string path = owner->path();
  std::atomic<bool> stop{false};
  std::vector<std::jthread> others;
  for (int i = 0; i < 8; ++i) {
    others.emplace_back([&] {
      const wire::Address address = wire::address_of(path);
      while (!stop) {
        const UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        (void)::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length);
      }
    });
  }
  const auto client = attach("engine", 1, 60s);
  EXPECT_TRUE(client.ok()) << client.status().to_string();
  owner.reset();
  stop = true;
}

TEST_F(OwnerAnswers, WhileItsProcessForksWithoutEnd) {
  const auto owner = serve("engine");
  std::atomic<bool> stop{false};
  std::vector<std::jthread> forking;
  for (int i = 0; i < 3; ++i) {
    forking.emplace_back([&] {
      while (!stop) EXPECT_EQ(exit_status(run_in_child([] { return 0; })), 0);
    });
  }
  for (int i = 0; i < 20; ++i) {
    auto client = attach("engine", 1, 60s);
    EXPECT_TRUE(client.ok()) << client.status().to_string();
  }
  stop = true;
}

}  // namespace
}  // namespace lmcn
