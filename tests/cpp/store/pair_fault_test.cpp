// A scheduler and its worker are two processes: either may be killed at any moment.
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <filesystem>
#include <functional>
#include <set>

#include "child_process.hpp"
#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

constexpr std::uint64_t kRank = 64 << 10;

class PairFaults : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    ::setenv("LMCN_RUNTIME_DIR", (root / "run").c_str(), 1);
    ASSERT_EQ(::pipe2(tells.data(), O_CLOEXEC), 0);
    ASSERT_EQ(::pipe2(told.data(), O_CLOEXEC), 0);
  }
  void TearDown() override {
    StoreTest::TearDown();
    ::unsetenv("LMCN_RUNTIME_DIR");
    for (const int fd : {tells[0], tells[1], told[0], told[1]}) ::close(fd);
  }
  static bool say(const std::array<int, 2>& pipe) { return ::write(pipe[1], "x", 1) == 1; }
  static bool hear(const std::array<int, 2>& pipe) {
    pollfd event{pipe[0], POLLIN, 0};
    char byte = 0;
    return ::poll(&event, 1, 60'000) == 1 && ::read(pipe[0], &byte, 1) == 1;
  }

  std::array<int, 2> tells{}, told{};  // child -> test, test -> child
};

TEST_F(PairFaults, AWorkerKilledWhileItHoldsSlotsGivesThemBack) {
  // The worker comes first, as in an engine.
  const pid_t worker = run_in_child([&] {
    auto client = RendezvousClient::attach("engine", 0, kRank, 30s);
    if (!client.ok()) return 1;
    if (!say(tells)) return 2;
    for (;;) ::pause();
  });
  open();
  ASSERT_TRUE(store->serve("engine", kRank).ok());
  ASSERT_TRUE(hear(tells)) << exit_status(worker);
  ASSERT_TRUE(becomes([&] { return store->stats().attached_ranks == 1; }));

  auto gathers = store->reserve(ns, keys(0, 3), kRank, true);  // its jobs, of which it says nothing any more
  ASSERT_TRUE(gathers.ok());
  ASSERT_TRUE(put(10));
  auto request = store->begin_request(ns, {});
  ASSERT_EQ(request->lookup(key(10)), Presence::kHit);
  auto scatter = request->acquire(keys(10, 11), true);
  ASSERT_TRUE(scatter.ok());
  scatter->release();
  request.reset();
  EXPECT_EQ(gathers->commit(), 0u) << "nothing was said to be in place";
  EXPECT_EQ(store->stats().host_quarantined_slots, 3u);

  ASSERT_EQ(::kill(worker, SIGKILL), 0);
  EXPECT_EQ(exit_status(worker), 128 + SIGKILL);
  EXPECT_TRUE(becomes([&] { return store->stats().attached_ranks == 0; }));
  EXPECT_TRUE(becomes([&] { return store->stats().host_quarantined_slots == 0; }));
  EXPECT_EQ(store->lookup(keys(0, 3)).hit, 0u);
  EXPECT_EQ(store->stats().host_pinned_slots, 0u);
  store->clear();
  EXPECT_EQ(store->stats().host_used_bytes, 0u);
  put_all(20, 24);
  EXPECT_EQ(get(21), "hit");
}

TEST_F(PairFaults, ASchedulerKilledLeavesItsWorkerAndItsStoreWhole) {
  with_nvme();
  options.lock_wait = 0ms;
  options.fail_when_locked = true;
  const pid_t scheduler = run_in_child([&] {
    StoreCore core(options);
    if (!core.start().ok() || !core.serve("engine", kRank).ok()) return 1;
    auto lease = core.reserve(ns, keys(0, 1), kPayload, false);
    if (!lease.ok()) return 2;
    fill(lease->payload(0), kPayload, 0);
    lease->mark_filled(0);
    if (lease->commit() != 1 || !core.flush(20s).ok()) return 3;
    auto under_way = core.reserve(ns, keys(1, 5), kPayload, true);
    if (!under_way.ok() || !say(tells)) return 4;
    for (;;) ::pause();
  });
  ASSERT_TRUE(hear(tells)) << exit_status(scheduler);
  auto worker = RendezvousClient::attach("engine", 0, kRank, 30s);  // this process is the worker
  ASSERT_TRUE(worker.ok()) << worker.status().to_string();
  EXPECT_EQ((*worker)->handle().owner_pid, static_cast<std::uint32_t>(scheduler));
  ASSERT_EQ(::kill(scheduler, SIGKILL), 0);
  EXPECT_EQ(exit_status(scheduler), 128 + SIGKILL);

  MappedArena& arena = (*worker)->arena();  // a gather that ends now writes into memory that is still there
  std::memset(arena.base(), 0x5A, arena.bytes());
  EXPECT_EQ(arena.base()[arena.bytes() - 1], std::byte{0x5A});

  ASSERT_NO_FATAL_FAILURE(open());  // the next scheduler, at once
  ASSERT_TRUE(store->serve("engine", kRank).ok());
  EXPECT_EQ(get(0), "hit");
  EXPECT_EQ(store->lookup(keys(1, 5)).hit, 0u) << "never published";
  EXPECT_FALSE(std::memcmp(store->arena_base(), arena.base(), 4096) == 0) << "another arena";
  auto again = RendezvousClient::attach("engine", 0, kRank, 30s);
  EXPECT_TRUE(again.ok()) << again.status().to_string();
}

// The arena is a memfd: no name that others could open, or that a killed process would leave behind.
TEST_F(PairFaults, NothingIsLeftInSharedMemory) {
  const auto names = [] {
    std::set<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) found.insert(entry.path().filename());
    return found;
  };
  const std::set<std::string> before = names();
  open();
  ASSERT_TRUE(put(0));
  for (const std::string& name : names()) EXPECT_TRUE(before.contains(name) || name.find("lmcn") == std::string::npos) << name;
  const std::string link = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(store->arena->memfd()));
  EXPECT_EQ(link.find("/memfd:lmcn-arena"), 0u) << link;
  EXPECT_EQ(::fcntl(store->arena->memfd(), F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW), F_SEAL_SHRINK | F_SEAL_GROW);
}

}  // namespace
}  // namespace lmcn
