#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <atomic>
#include <barrier>
#include <csignal>
#include <cstring>
#include <latch>
#include <set>
#include <thread>

#include "attach/rendezvous_wire.hpp"
#include "attach_fixture.hpp"

namespace lmcn {
namespace {

namespace fs = std::filesystem;
using Rendezvous = AttachTest;

bool waits_until(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + 20s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

// What the owner answers to a hello; blocks.
Status answer_to(const std::string& path, const void* hello, std::size_t bytes) {
  const UniqueFd socket = connect_raw(path);
  EXPECT_EQ(::send(socket.get(), hello, bytes, MSG_NOSIGNAL), static_cast<ssize_t>(bytes));
  pollfd event{socket.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&event, 1, 20'000), 1);
  wire::Reply reply;
  UniqueFd memfd;
  LMCN_RETURN_IF_ERROR(wire::receive_reply(socket.get(), reply, memfd));
  return wire::status_of(reply);
}

// A worker that has the arena and is to end in its own way; invalid when the owner refused it.
UniqueFd attached_raw(const std::string& path, std::uint32_t rank) {
  UniqueFd socket = connect_raw(path);
  wire::Hello hello;
  hello.rank = rank;
  hello.rank_bytes = AttachTest::kRankBytes;
  pollfd event{socket.get(), POLLIN, 0};
  wire::Reply reply;
  UniqueFd memfd;
  const bool attached = wire::send_hello(socket.get(), hello).ok() && ::poll(&event, 1, 20'000) == 1 &&
                        wire::receive_reply(socket.get(), reply, memfd).ok() && memfd.valid();
  return attached ? std::move(socket) : UniqueFd();
}

TEST_F(Rendezvous, WorkerSharesTheOwnersArena) {
  const auto owner = serve("engine");
  EXPECT_EQ(owner->path(), scratch_.path() + "/run/engine.sock");
  std::strcpy(reinterpret_cast<char*>(arena_->base()), "from the owner");
  const pid_t worker = run_in_child([] {
    const auto attachment = ArenaAttachment::attach("engine", 1, kRankBytes, 10s);
    if (!attachment.ok()) return 1;
    ArenaAttachment& arena = **attachment;
    if (arena.bytes() != kArenaBytes || arena.owner_pid() != static_cast<std::uint32_t>(::getppid())) return 2;
    if (std::strcmp(reinterpret_cast<char*>(arena.base()), "from the owner") != 0) return 3;
    std::strcpy(reinterpret_cast<char*>(arena.base()), "from the worker");
    return 0;
  });
  EXPECT_EQ(exit_status(worker), 0);
  EXPECT_STREQ(reinterpret_cast<char*>(arena_->base()), "from the worker");
}

TEST_F(Rendezvous, WorkerMayComeBeforeTheOwner) {
  std::atomic<bool> attached{false};
  std::latch trying(1);
  std::jthread worker([&] {
    EXPECT_EQ(attach("late", 0, 1ms).status().code(), Code::kDeadlineExceeded);
    trying.count_down();
    auto client = attach("late", 0, 20s);
    EXPECT_TRUE(client.ok()) << client.status().to_string();
    attached = client.ok();
  });
  trying.wait();
  const auto owner = serve("late");
  worker.join();
  EXPECT_TRUE(attached);
}

TEST_F(Rendezvous, DeadlineNamesTheSocket) {
  for (const auto deadline : {-5ms, 0ms, 30ms}) {
    const auto client = attach("nobody", 0, deadline);
    ASSERT_FALSE(client.ok());
    EXPECT_EQ(client.status().code(), Code::kDeadlineExceeded);
    EXPECT_NE(client.status().message().find(scratch_.path() + "/run/nobody.sock"), std::string::npos) << client.status().message();
  }
}

TEST_F(Rendezvous, WrongRankBytesAndRanksAreRefusedNamingBoth) {
  const auto owner = serve("engine", 2);
  const auto wrong_bytes = RendezvousClient::attach("engine", 0, kRankBytes + 1, 10s);
  EXPECT_EQ(wrong_bytes.status().code(), Code::kInvalidArgument);
  EXPECT_NE(wrong_bytes.status().message().find("65537"), std::string::npos) << wrong_bytes.status().message();
  EXPECT_NE(wrong_bytes.status().message().find("65536"), std::string::npos) << wrong_bytes.status().message();
  const auto wrong_rank = attach("engine", 2);
  EXPECT_EQ(wrong_rank.status().code(), Code::kInvalidArgument);
  EXPECT_NE(wrong_rank.status().message().find("rank is 2, the owner expects 2 ranks"), std::string::npos)
      << wrong_rank.status().message();
  EXPECT_EQ(owner->attached_ranks(), 0u);
}

TEST_F(Rendezvous, OwnerAndWorkerAgreeOnWhatTheRanksShare) {
  const auto own_parts = serve("own", 2);
  const auto shares = RendezvousClient::attach("own", 1, kRankBytes, 10s, true);
  EXPECT_EQ(shares.status().code(), Code::kInvalidArgument);
  EXPECT_NE(shares.status().message().find("replicated is 1, the owner expects 0"), std::string::npos) << shares.status().message();

  ArenaHandle shared = handle(2);
  shared.replicated = true;
  const auto one_part = RendezvousOwner::listen("one", arena_->memfd(), shared, {});
  ASSERT_TRUE(one_part.ok()) << one_part.status().to_string();
  const auto shares_not = attach("one", 1);
  EXPECT_EQ(shares_not.status().code(), Code::kInvalidArgument);
  EXPECT_NE(shares_not.status().message().find("replicated is 0, the owner expects 1"), std::string::npos)
      << shares_not.status().message();
  const auto attached = RendezvousClient::attach("one", 1, kRankBytes, 10s, true);
  ASSERT_TRUE(attached.ok()) << attached.status().to_string();
  EXPECT_TRUE((*attached)->handle().replicated);
}

TEST_F(Rendezvous, ARankIsAttachedOnce) {
  const auto owner = serve("engine");
  auto first = attach("engine", 3);
  ASSERT_TRUE(first.ok());
  const auto second = attach("engine", 3, 500ms);
  EXPECT_EQ(second.status().code(), Code::kLocked);
  EXPECT_NE(second.status().message().find("rank 3 is attached already, by process " + std::to_string(::getpid())),
            std::string::npos)
      << second.status().message();
  *first = nullptr;
  EXPECT_TRUE(attach("engine", 3).ok()) << "free again";
}

TEST_F(Rendezvous, ASecondOwnerIsRefused) {
  const auto owner = serve("engine");
  const auto second = listen("engine");
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kLocked);
  EXPECT_NE(second.status().message().find(std::to_string(::getpid())), std::string::npos) << second.status().message();
  EXPECT_TRUE(serve("another") != nullptr);
  EXPECT_TRUE(attach("engine", 0).ok()) << "the first still serves";
}

TEST_F(Rendezvous, OwnersInARaceForOneIdLeaveExactlyOne) {
  for (int round = 0; round < 20; ++round) {
    constexpr int kOwners = 4;
    std::latch start(kOwners);
    std::vector<std::unique_ptr<RendezvousOwner>> owners(kOwners);
    std::atomic<int> locked{0};
    {
      std::vector<std::jthread> threads;
      for (int i = 0; i < kOwners; ++i) {
        threads.emplace_back([&, i] {
          start.arrive_and_wait();
          auto owner = listen("raced");
          if (owner.ok()) {
            owners[static_cast<std::size_t>(i)] = std::move(*owner);
          } else if (owner.status().code() == Code::kLocked) {
            ++locked;
          }
        });
      }
    }
    EXPECT_EQ(locked, kOwners - 1);
    EXPECT_TRUE(attach("raced", 0).ok());
  }
}

TEST_F(Rendezvous, StaleSocketFilesAreReplaced) {
  const pid_t killed = run_in_child([this] {
    auto owner = listen("engine");
    return owner.ok() ? (::kill(::getpid(), SIGKILL), 1) : 2;
  });
  EXPECT_EQ(exit_status(killed), 128 + SIGKILL);
  ASSERT_TRUE(fs::is_socket(scratch_.path() + "/run/engine.sock"));
  const auto owner = serve("engine");
  EXPECT_TRUE(attach("engine", 0).ok());
}

TEST_F(Rendezvous, WhatKilledEnginesLeftIsRemovedByTheNextOwnerOfAnyId) {
  const auto left = [this] {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(scratch_.path() + "/run")) names.insert(entry.path().filename().string());
    return names;
  };
  const pid_t killed = run_in_child([&] {
    auto first = listen("dead-1");
    auto second = listen("dead-2");
    return first.ok() && second.ok() ? (::kill(::getpid(), SIGKILL), 1) : 2;
  });
  EXPECT_EQ(exit_status(killed), 128 + SIGKILL);
  std::fclose(std::fopen((scratch_.path() + "/run/notes.sock").c_str(), "w"));
  EXPECT_EQ(left(), (std::set<std::string>{"dead-1.sock", "dead-2.sock", "notes.sock"}));
  const auto first = serve("first");
  EXPECT_EQ(left(), (std::set<std::string>{"first.sock", "notes.sock"}));
  const auto second = serve("second");
  EXPECT_EQ(left(), (std::set<std::string>{"first.sock", "notes.sock", "second.sock"})) << "a live one stays";
  EXPECT_TRUE(attach("first", 0).ok());
}

TEST_F(Rendezvous, AForkedChildKeepsNoListener) {
  int released[2];
  int told[2];
  ASSERT_EQ(::pipe2(released, O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(told, O_CLOEXEC), 0);
  const pid_t killed = run_in_child([&] {
    auto owner = listen("engine");
    if (!owner.ok()) return 2;
    const pid_t orphan = run_in_child([&] {
      ::close(released[1]);
      char byte = 0;
      if (::write(told[1], &byte, 1) != 1) return 1;      // before it runs it has let go of nothing
      return ::read(released[0], &byte, 1) == 0 ? 0 : 1;  // until the test is over
    });
    return orphan > 0 ? (::kill(::getpid(), SIGKILL), 1) : 3;
  });
  ::close(released[0]);
  ::close(told[1]);
  char byte;
  EXPECT_EQ(::read(told[0], &byte, 1), 1);
  EXPECT_EQ(exit_status(killed), 128 + SIGKILL);
  const UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  const wire::Address address = wire::address_of(scratch_.path() + "/run/engine.sock");
  EXPECT_NE(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length), 0);
  EXPECT_EQ(errno, ECONNREFUSED);
  ::close(released[1]);
  ::close(told[0]);
}

// An owner died, a child that it made by clone() itself still holds its listening socket: connections succeed, nobody ever answers.
TEST_F(Rendezvous, AListenerLeftInAClonedChildIsStale) {
  int released[2];
  ASSERT_EQ(::pipe2(released, O_CLOEXEC), 0);
  const pid_t killed = run_in_child([&] {
    auto owner = listen("engine");
    if (!owner.ok()) return 2;
    const auto orphan = static_cast<pid_t>(::syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr));
    if (orphan == 0) {
      ::close(released[1]);
      char byte;
      ::_exit(::read(released[0], &byte, 1) == 0 ? 0 : 1);  // until the test is over
    }
    return orphan > 0 ? (::kill(::getpid(), SIGKILL), 1) : 3;
  });
  ::close(released[0]);
  EXPECT_EQ(exit_status(killed), 128 + SIGKILL);
  {
    const UniqueFd reached = connect_raw(scratch_.path() + "/run/engine.sock");
    EXPECT_TRUE(reached.valid());
  }
  std::latch trying(1);
  std::jthread worker([&] {  // is held up by the dead listener for a while, then finds the new one
    trying.count_down();
    auto client = attach("engine", 0, 20s);
    EXPECT_TRUE(client.ok()) << client.status().to_string();
  });
  trying.wait();
  const auto owner = serve("engine");
  worker.join();
  ::close(released[1]);
}

TEST_F(Rendezvous, WhatIsNotASocketIsNotRemoved) {
  ASSERT_TRUE(runtime_directory().ok());
  const std::string path = scratch_.path() + "/run/engine.sock";
  std::fclose(std::fopen(path.c_str(), "w"));
  const auto owner = listen("engine");
  EXPECT_EQ(owner.status().code(), Code::kInvalidArgument);
  EXPECT_NE(owner.status().message().find(path), std::string::npos);
  EXPECT_TRUE(fs::is_regular_file(path));
  fs::remove(path);
  fs::create_symlink(scratch_.path() + "/elsewhere", path);
  EXPECT_EQ(listen("engine").status().code(), Code::kInvalidArgument);
  EXPECT_TRUE(fs::is_symlink(path));
}

TEST_F(Rendezvous, TheSocketIsPrivateAndGoesWithItsOwner) {
  auto owner = serve("engine");
  const std::string path = owner->path();
  struct stat status{};
  ASSERT_EQ(::lstat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);
  owner.reset();
  EXPECT_FALSE(fs::exists(path));
  EXPECT_TRUE(fs::is_empty(scratch_.path() + "/run")) << "something else is left";
}

TEST_F(Rendezvous, OnlyItsOwnSocketFileIsRemoved) {
  auto owner = serve("engine");
  const std::string path = owner->path();
  fs::rename(path, path + ".moved");
  auto second = serve("engine");
  owner.reset();
  EXPECT_TRUE(fs::is_socket(path));
  EXPECT_TRUE(attach("engine", 0).ok());
}

TEST_F(Rendezvous, TheDeathOfAWorkerIsSeen) {
  const auto owner = serve("engine");
  const pid_t worker = run_in_child([] {
    auto client = attach("engine", 2);
    return client.ok() ? (::kill(::getpid(), SIGKILL), 1) : 2;
  });
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{2});
  EXPECT_EQ(exit_status(worker), 128 + SIGKILL);
  EXPECT_EQ(owner->attached_ranks(), 0u);
  EXPECT_TRUE(attach("engine", 2).ok()) << "its successor";
}

TEST_F(Rendezvous, TheDeathOfAWorkerIsSeenThoughItsChildHoldsTheConnection) {
  const auto owner = serve("engine");
  int released[2];
  ASSERT_EQ(::pipe2(released, O_CLOEXEC), 0);
  const pid_t worker = run_in_child([&] {
    auto client = attach("engine", 2);
    if (!client.ok()) return 2;
    const pid_t orphan = run_in_child([&] {
      ::close(released[1]);
      char byte;
      return ::read(released[0], &byte, 1) == 0 ? 0 : 1;
    });
    return orphan > 0 ? (::kill(::getpid(), SIGKILL), 1) : 3;
  });
  ::close(released[0]);
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{2});
  EXPECT_EQ(exit_status(worker), 128 + SIGKILL);
  ::close(released[1]);
}

TEST_F(Rendezvous, DetachingIsSeen) {
  const auto owner = serve("engine");
  auto first = attach("engine", 0);
  auto second = attach("engine", 1);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(owner->attached_ranks(), 2u);
  *second = nullptr;
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{1});
  EXPECT_EQ(owner->attached_ranks(), 1u);
}

TEST_F(Rendezvous, ManyRanksAtOnce) {
  constexpr std::uint32_t kRanks = 64;
  const auto owner = serve("engine", kRanks);
  std::barrier together(kRanks);
  std::atomic<std::uint32_t> failed{0};
  std::atomic<std::uint32_t> seen{0};
  {
    std::vector<std::jthread> workers;
    for (std::uint32_t rank = 0; rank < kRanks; ++rank) {
      workers.emplace_back([&, rank] {
        auto client = attach("engine", rank, 60s);
        if (client.ok()) {
          (*client)->arena().base()[rank * 4096] = static_cast<std::byte>(rank);
        } else {
          ++failed;
        }
        together.arrive_and_wait();
        if (rank == 0) seen = owner->attached_ranks();
        together.arrive_and_wait();
      });
    }
  }
  EXPECT_EQ(seen, kRanks);
  EXPECT_EQ(failed, 0u);
  EXPECT_EQ(wait_gone(kRanks).size(), kRanks);
  for (std::uint32_t rank = 0; rank < kRanks; ++rank) EXPECT_EQ(arena_->base()[rank * 4096], static_cast<std::byte>(rank));
}

TEST_F(Rendezvous, GarbageIsRefusedAndDisturbsNobody) {
  const auto owner = serve("engine");
  auto worker = attach("engine", 0);
  ASSERT_TRUE(worker.ok());

  const std::string noise(100'000, 'x');
  for (const std::size_t bytes :
       {std::size_t{1}, sizeof(wire::Hello) - 1, sizeof(wire::Hello), sizeof(wire::Hello) + 1, noise.size()}) {
    const Status status = answer_to(owner->path(), noise.data(), bytes);
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << bytes << " bytes: " << status.to_string();
  }
  wire::Hello future;
  future.version = 2;
  future.rank_bytes = kRankBytes;
  future.rank = 1;
  const Status status = answer_to(owner->path(), &future, sizeof future);
  EXPECT_EQ(status.code(), Code::kUnsupported);
  EXPECT_NE(status.message().find("version 2"), std::string::npos) << status.message();

  std::vector<UniqueFd> silent;  // connect and say nothing
  for (int i = 0; i < 100; ++i) silent.push_back(connect_raw(owner->path()));
  EXPECT_TRUE(attach("engine", 1).ok());
  const std::lock_guard lock(mutex_);
  EXPECT_EQ(std::count(gone_.begin(), gone_.end(), 0u), 0) << "the worker was disturbed";
}

TEST_F(Rendezvous, SilentConnectionsAreDroppedAtTheirDeadline) {
  const auto owner = serve("engine");
  const UniqueFd silent = connect_raw(owner->path());
  char byte;
  EXPECT_EQ(::recv(silent.get(), &byte, 1, 0), 0);  // blocks until the owner closes
}

TEST_F(Rendezvous, AnAttachedWorkerThatTalksLosesItsConnection) {
  const auto owner = serve("engine");
  const pid_t worker = run_in_child([&] {
    const UniqueFd socket = attached_raw(owner->path(), 1);
    if (!socket.valid() || ::send(socket.get(), "and another thing", 17, MSG_NOSIGNAL) != 17) return 2;
    char byte;
    return ::recv(socket.get(), &byte, 1, 0) == 0 ? 0 : 3;  // blocks until the owner closes
  });
  EXPECT_EQ(exit_status(worker), 0);
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{1});
}

// Its device may copy for it still.
TEST_F(Rendezvous, AWorkerWithoutAGoodbyeIsGoneOnlyWhenItsProcessIs) {
  const auto owner = serve("engine");
  int closed[2], released[2];
  ASSERT_EQ(::pipe2(closed, O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(released, O_CLOEXEC), 0);
  const pid_t worker = run_in_child([&] {
    ::close(closed[0]);
    ::close(released[1]);
    UniqueFd socket = attached_raw(owner->path(), 2);
    if (!socket.valid()) return 2;
    socket.reset();
    ::close(closed[1]);
    char byte;
    return ::read(released[0], &byte, 1) == 0 ? 0 : 1;
  });
  ::close(closed[1]);
  ::close(released[0]);
  char byte;
  EXPECT_EQ(::read(closed[0], &byte, 1), 0);
  // Another's end, which comes after that of the socket, is seen.
  ASSERT_TRUE(attach("engine", 1).ok());
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{1});
  EXPECT_EQ(owner->attached_ranks(), 1u);
  const Status refused = attach("engine", 2, 1s).status();
  EXPECT_EQ(refused.code(), Code::kLocked);
  EXPECT_NE(refused.message().find("by process " + std::to_string(worker) + ", whose connection has ended"), std::string::npos)
      << refused.message();
  ::close(released[1]);
  EXPECT_EQ(exit_status(worker), 0);
  EXPECT_EQ(wait_gone(2), (std::vector<std::uint32_t>{1, 2}));
  EXPECT_TRUE(attach("engine", 2).ok()) << "its successor";
  ::close(closed[0]);
}

// What a forked child destroys of its parent's says nothing to the owner.
TEST_F(Rendezvous, AForkedChildSaysNoGoodbye) {
  const auto owner = serve("engine");
  auto client = attach("engine", 0);
  ASSERT_TRUE(client.ok());
  const pid_t child = run_in_child([&] {
    client->reset();
    return 0;
  });
  EXPECT_EQ(exit_status(child), 0);
  ASSERT_TRUE(attach("engine", 1).ok());
  EXPECT_EQ(wait_gone(1), std::vector<std::uint32_t>{1});
  client->reset();
  EXPECT_EQ(wait_gone(2), (std::vector<std::uint32_t>{1, 0}));
}

// It did not wait for the answer: it has no arena, and a rank that nobody holds is free at once.
TEST_F(Rendezvous, AWorkerThatGaveUpHoldsNoRank) {
  const auto owner = serve("engine");
  for (int i = 0; i < 50; ++i) {
    const Status status = attach("engine", 0, 0ms).status();
    EXPECT_TRUE(status.ok() || status.code() == Code::kDeadlineExceeded || status.code() == Code::kLocked) << status.to_string();
  }
  EXPECT_TRUE(waits_until([&] { return owner->attached_ranks() == 0; }));
  EXPECT_TRUE(attach("engine", 0).ok());
}

TEST_F(Rendezvous, OtherUsersAreRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to become another user";
  const auto owner = serve("engine");
  ASSERT_EQ(::chmod(scratch_.path().c_str(), 0755), 0);
  ASSERT_EQ(::chmod((scratch_.path() + "/run").c_str(), 0755), 0);  // the directory alone would keep them out
  ASSERT_EQ(::chmod(owner->path().c_str(), 0666), 0);
  const std::string path = owner->path();
  const pid_t stranger = run_in_child([&] {
    if (::setgid(12345) != 0 || ::setuid(12345) != 0) return 9;
    const UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    const wire::Address address = wire::address_of(path);
    if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) return 8;
    pollfd event{socket.get(), POLLIN, 0};
    if (::poll(&event, 1, 20'000) != 1) return 7;
    wire::Reply reply;
    UniqueFd memfd;
    if (!wire::receive_reply(socket.get(), reply, memfd).ok()) return 6;
    const Status status = wire::status_of(reply);
    return status.code() == Code::kInvalidArgument && status.message().find("12345") != std::string::npos && !memfd.valid() ? 0 : 1;
  });
  EXPECT_EQ(exit_status(stranger), 0);
  EXPECT_EQ(owner->attached_ranks(), 0u);
}

TEST_F(Rendezvous, AnOwnerOfAnotherUserIsNotTrusted) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to become another user";
  ASSERT_TRUE(runtime_directory().ok());
  ASSERT_EQ(::chmod(scratch_.path().c_str(), 0755), 0);
  int ready[2];
  int released[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(released, O_CLOEXEC), 0);
  const std::string path = scratch_.path() + "/run/engine.sock";
  const pid_t stranger = run_in_child([&] {
    ::close(released[1]);
    const UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    const wire::Address address = wire::address_of(path);
    if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) return 9;
    if (::setgid(12345) != 0 || ::setuid(12345) != 0 || ::listen(socket.get(), 1) != 0) return 8;
    char byte = 0;
    if (::write(ready[1], &byte, 1) != 1) return 7;
    return ::read(released[0], &byte, 1) == 0 ? 0 : 6;
  });
  char byte;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  const auto client = attach("engine", 0);
  EXPECT_EQ(client.status().code(), Code::kInvalidArgument);
  EXPECT_NE(client.status().message().find("12345"), std::string::npos) << client.status().to_string();
  for (const int fd : {ready[0], ready[1], released[0], released[1]}) ::close(fd);
  EXPECT_EQ(exit_status(stranger), 0);
}

TEST_F(Rendezvous, RefusesHandlesThatDoNotFitTheArena) {
  const auto refuses = [this](const ArenaHandle& wrong, int memfd, const char* name) {
    const auto owner = RendezvousOwner::listen("engine", memfd, wrong, {});
    EXPECT_EQ(owner.status().code(), Code::kInvalidArgument);
    EXPECT_NE(owner.status().message().find(name), std::string::npos) << owner.status().message();
  };
  ArenaHandle wrong = handle();
  wrong.rank_count = 0;
  refuses(wrong, arena_->memfd(), "rank_count");
  wrong.rank_count = 65;
  refuses(wrong, arena_->memfd(), "65");
  wrong = handle();
  wrong.rank_bytes = 0;
  refuses(wrong, arena_->memfd(), "rank_bytes");
  wrong = handle();
  wrong.arena_bytes += 1;
  refuses(wrong, arena_->memfd(), "arena_bytes");
  refuses(handle(), -1, "memfd");
}

TEST_F(Rendezvous, AForkedChildMayDestroyTheOwner) {
  auto owner = serve("engine");
  const pid_t child = run_in_child([&] {
    owner.reset();
    return 0;
  });
  EXPECT_EQ(exit_status(child), 0);
  EXPECT_TRUE(attach("engine", 0).ok()) << "the parent still serves";
}

std::set<int> open_descriptors() {
  std::set<int> descriptors;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    const int fd = std::stoi(entry.path().filename().string());
    if (::fcntl(fd, F_GETFD) >= 0) descriptors.insert(fd);
  }
  // The iterator's own is among them or not, by chance of its number: it is closed now.
  std::erase_if(descriptors, [](int fd) { return ::fcntl(fd, F_GETFD) < 0; });
  return descriptors;
}

TEST_F(Rendezvous, NoDescriptorIsLeftBehindOrInherited) {
  const std::set<int> before = open_descriptors();
  {
    const auto owner = serve("engine");
    const auto client = attach("engine", 0);
    EXPECT_TRUE(client.ok());
    EXPECT_FALSE(attach("engine", 9).ok());
    EXPECT_FALSE(listen("engine").ok());
    (void)answer_to(owner->path(), "garbage", 7);
    int added = 0;
    for (const int fd : open_descriptors()) {
      if (before.contains(fd)) continue;
      ++added;
      EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0) << fd;
    }
    EXPECT_GE(added, 5) << "directory, listener, eventfd and the two ends";
  }
  EXPECT_EQ(open_descriptors(), before);
}

}  // namespace
}  // namespace lmcn
