// The process that owns a store forks: its child can go, and can stay, without harm to the parent or to whoever opens next.
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <functional>

#include "child_process.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

class ForkFaults : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    ::setenv("LMCN_RUNTIME_DIR", (root / "run").c_str(), 1);
    with_nvme();
    options.lock_wait = 0ms;
    options.fail_when_locked = true;
  }
  void TearDown() override {
    StoreTest::TearDown();
    ::unsetenv("LMCN_RUNTIME_DIR");
  }
  std::filesystem::path socket() const { return root / "run" / "engine.sock"; }
};

TEST_F(ForkFaults, AChildMayDestroyEverythingWhateverTheParentWasDoing) {
  open();
  ASSERT_TRUE(store->serve("engine", kPayload).ok());
  put_all(0, 4);
  flush();
  auto write = store->reserve(ns, keys(10, 12), kPayload, false);
  ASSERT_TRUE(write.ok());
  auto read = store->acquire(ns, keys(0, 2), 10s);
  ASSERT_TRUE(read.ok());
  auto request = store->begin_request(ns, {});
  ASSERT_EQ(request->lookup(key(3)), Presence::kHit);

  store->mu.lock();  // as if one of its threads were in the middle of something
  const pid_t child = run_in_child([&] {
    if (!store->inherited()) return 1;
    if (store->lookup(keys(0, 1)).hit != 0 || store->reserve(ns, keys(20, 21), kPayload, false).ok()) return 2;
    if (store->acquire(ns, keys(0, 1), 10s).ok() || store->flush(10s).code() != Code::kUnavailable) return 3;
    if (store->erase(key(0)) || store->stats().lookups != 0 || store->nvme_ready() || store->nvme_warning().empty()) return 4;
    store->clear();
    store->touch(keys(0, 1));
    if (request->acquire(keys(3, 4), false).ok() || request->lookup(key(0)) != Presence::kMiss) return 5;
    write->commit();
    read->release();
    request.reset();
    if (!store->close(10s).ok()) return 6;
    std::unique_ptr<TieredStore> as_users_hold_it(store.release());
    as_users_hold_it.reset();
    return 0;
  });
  store->mu.unlock();
  EXPECT_EQ(exit_status(child), 0);

  EXPECT_TRUE(std::filesystem::exists(socket()));
  write->mark_filled(0);
  EXPECT_EQ(write->commit(), 1u);
  read->release();
  request.reset();
  put_all(30, 34);
  flush();
  EXPECT_EQ(get(30), "hit");
  EXPECT_FALSE(TieredStore::open(options).ok()) << "the child must not have let go of the lock";
  reopen();
  for (int i : {0, 1, 2, 3, 30, 31, 32, 33}) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(ForkFaults, AChildMayExitWithoutDestroyingAnything) {
  open();
  put_all(0, 2);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    std::_Exit(0);
  }
  EXPECT_EQ(exit_status(child), 0);
  flush();
  EXPECT_EQ(get(1), "hit");
}

// multiprocessing, a helper of a C++ server: the child lives on after the parent was killed.
TEST_F(ForkFaults, AfterTheParentsDeathALivingChildKeepsNothing) {
  for (const char* engine : {"io_uring", "threads"}) {
    options.io_engine = engine;
    std::filesystem::remove_all(options.directories[0]);
    std::array<int, 2> child_waits{};
    std::array<int, 2> child_tells{};
    ASSERT_EQ(::pipe2(child_waits.data(), O_CLOEXEC), 0);
    ASSERT_EQ(::pipe2(child_tells.data(), O_CLOEXEC), 0);
    const pid_t parent = run_in_child([&] {
      StoreCore parents(options);
      if (!parents.start().ok() || !parents.serve("engine", kPayload).ok()) return 1;
      auto lease = parents.reserve(ns, keys(0, 1), kPayload, false);
      if (!lease.ok()) return 2;
      fill(lease->payload(0), kPayload, 0);
      lease->mark_filled(0);
      if (lease->commit() != 1 || !parents.flush(20s).ok()) return 3;
      if (::fork() == 0) {
        ::close(child_waits[1]);
        const pid_t self = ::getpid();  // told by itself: before it runs it has let go of nothing
        const ssize_t told = ::write(child_tells[1], &self, sizeof self);
        char byte = 0;
        const ssize_t n = ::read(child_waits[0], &byte, 1);  // until the test lets it go
        ::_exit(told == sizeof self && n == 0 ? 0 : 1);
      }
      for (;;) ::pause();
    });
    pollfd told{child_tells[0], POLLIN, 0};
    ASSERT_EQ(::poll(&told, 1, 60'000), 1) << exit_status(parent);
    pid_t child = -1;
    ASSERT_EQ(::read(child_tells[0], &child, sizeof child), static_cast<ssize_t>(sizeof child));
    ASSERT_EQ(::kill(parent, SIGKILL), 0);
    ASSERT_EQ(exit_status(parent), 128 + SIGKILL);
    ASSERT_EQ(::kill(child, 0), 0);

    ASSERT_NO_FATAL_FAILURE(open());  // without waiting for the lock
    EXPECT_TRUE(store->nvme_ready()) << store->nvme_warning();
    EXPECT_TRUE(store->serve("engine", kPayload).ok());
    EXPECT_EQ(get(0), "hit");
    store.reset();
    ::close(child_waits[1]);  // the child exits; init reaps it
    for (const int fd : {child_waits[0], child_tells[0], child_tells[1]}) ::close(fd);
  }
}

}  // namespace
}  // namespace lmcn
