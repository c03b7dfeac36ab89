// A store whose directories another process has: it serves from host memory, and takes them over when that lets go.
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <map>

#include "base/seq_points.hpp"
#include "nvme/directory.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

constexpr const char* kTry = "store.before_take_over";
constexpr const char* kBefore = "store.before_attach";
constexpr const char* kReading = "store.reading_index";
constexpr const char* kSlice = "store.attach_slice";

class TakeOver : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    with_nvme();
    options.lock_wait = 0ms;
  }
  /// `old` has chunks [0, count) on NVMe and the directory; `store` waits for it.
  void start_waiting(int count) {
    open();
    put_all(0, count);
    flush();
    old = std::move(store);
    begin();
  }
  void begin() {
    store = std::make_unique<StoreCore>(options);
    store->attach_slice = attach_slice;
    store->wrap_engine = [this](std::unique_ptr<io::IoEngine> inner) {
      auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
      watched.push_back(wrapped.get());
      return wrapped;
    };
    watched.clear();
    const Status started = store->start();
    ASSERT_TRUE(started.ok()) << started.to_string();
    ASSERT_EQ(store->stats().nvme_waiting, 1u);
    ASSERT_FALSE(store->nvme_ready());
  }
  void old_lets_go() {
    const Status closed = old->close(10s);
    ASSERT_TRUE(closed.ok()) << closed.to_string();
    old.reset();
  }
  bool attached() {
    return becomes([&] { return store->nvme_ready(); });
  }
  /// What is in the directory: size, inode, time of the last change. Not LOCK.
  std::map<std::string, std::string> content(const std::string& directory) const {
    std::map<std::string, std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      if (entry.path().filename() == "LOCK") continue;
      struct stat found{};
      EXPECT_EQ(::stat(entry.path().c_str(), &found), 0);
      all[entry.path().filename()] = std::to_string(found.st_size) + " " + std::to_string(found.st_ino) + " " +
                                     std::to_string(found.st_ctim.tv_sec) + "." + std::to_string(found.st_ctim.tv_nsec);
    }
    return all;
  }
  std::uint64_t requests_to_disk() const {
    std::uint64_t sum = 0;
    for (const io::FaultyEngine* engine : watched) sum += engine->counts().requests;
    return sum;
  }
  std::unique_ptr<StoreCore> old;
  std::vector<io::FaultyEngine*> watched;  // of begin()
  std::uint32_t attach_slice = 4096;
};

TEST_F(TakeOver, ServesFromHostMemoryAndFindsWhatTheOwnerWroteLast) {
  start_waiting(20);
  EXPECT_NE(store->nvme_warning().find("pid " + std::to_string(::getpid())), std::string::npos) << store->nvme_warning();
  put_all(100, 110);
  EXPECT_EQ(get(105), "hit");
  EXPECT_EQ(get(5), "miss");
  std::swap(store, old);
  put_all(20, 30);
  std::swap(store, old);
  old_lets_go();
  ASSERT_TRUE(attached());
  EXPECT_EQ(store->nvme_warning(), "");
  EXPECT_EQ(store->stats().nvme_waiting, 0u);
  EXPECT_EQ(store->stats().recovered_chunks, 30u);
  for (int i = 0; i < 30; ++i) EXPECT_EQ(get(i), "hit") << i;
  flush();
  EXPECT_EQ(store->stats().demoted_chunks, 10u) << "what was stored while waiting goes to NVMe as well, and nothing twice";
  EXPECT_GE(store->stats().nvme_day_bytes, 40u * (kPayload + kPageBytes)) << "the old owner's writes of the day count";
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 40u);
  for (int i = 100; i < 110; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(TakeOver, FromAProcessThatIsKilled) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::alarm(120);
    open();
    put_all(0, 20);
    flush();
    const char byte = HasFailure() ? 'n' : 'y';
    if (::write(ready[1], &byte, 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  ::close(ready[1]);
  ASSERT_EQ(byte, 'y');
  begin();
  EXPECT_NE(store->nvme_warning().find("pid " + std::to_string(child)), std::string::npos) << store->nvme_warning();
  put_all(100, 110);
  ASSERT_EQ(::kill(child, SIGKILL), 0);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  ASSERT_TRUE(attached());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
  for (int i = 100; i < 110; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(TakeOver, NothingIsTouchedBeforeTheLockIsHeld) {
  open();
  put_all(0, 20);
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  auto owner = nvme::Directory::open(options.directories[0], 0ms);
  ASSERT_TRUE(owner.ok());
  const auto before = content(options.directories[0]);
  SeqPointScope scope;
  SeqPoints::hold(kTry);
  begin();
  for (int tries = 0; tries < 3; ++tries) {
    ASSERT_TRUE(SeqPoints::wait_until_reached(kTry, 60s));
    EXPECT_EQ(content(options.directories[0]), before);
    SeqPoints::step(kTry);
  }
  put_all(100, 101);
  flush();
  ASSERT_TRUE(SeqPoints::wait_until_reached(kTry, 60s));
  SeqPoints::release(kTry);
  EXPECT_EQ(content(options.directories[0]), before);
  EXPECT_EQ(requests_to_disk(), 0u);
  ASSERT_TRUE(store->close(10s).ok());
  EXPECT_EQ(content(options.directories[0]), before) << "closing while it waits writes nothing";
  owner.value().reset();
  store.reset();
  options.lock_wait = 10s;
  open();
  EXPECT_EQ(store->stats().recovered_chunks, 20u);
}

TEST_F(TakeOver, OthersWorkWhileRecordsComeIn) {
  attach_slice = 4;
  start_waiting(20);
  put_all(5, 8);  // there are records of these, too
  SeqPointScope scope;
  SeqPoints::hold(kSlice);
  old_lets_go();
  for (int slice = 0; slice < 4; ++slice) {
    ASSERT_TRUE(SeqPoints::wait_until_reached(kSlice, 60s));
    EXPECT_TRUE(put(200 + slice));
    EXPECT_EQ(get(200 + slice), "hit");
    EXPECT_EQ(get(6), "hit");
    EXPECT_EQ(get(1), "miss") << "nothing is followed before all are in";
    EXPECT_TRUE(slice != 1 || put(12));
    EXPECT_TRUE(slice != 2 || store->erase(key(2)));
    if (slice == 3) evict_all(1000);
    SeqPoints::step(kSlice);
  }
  SeqPoints::release(kSlice);
  ASSERT_TRUE(attached());
  EXPECT_EQ(get(2), "miss");
  flush();
  const std::uint64_t entries_live = store->stats().nvme_live_bytes / (kPayload + kPageBytes);
  std::uint64_t with_extent = 0;
  {
    std::lock_guard lock(store->mu);
    store->index.for_each([&](EntryId, Entry& entry) { with_extent += entry.extent.valid() ? 1 : 0; });
  }
  EXPECT_EQ(entries_live, with_extent) << "an erased record is not live any more";
  for (int i = 3; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(TakeOver, ClearedWhileItWaits) {
  start_waiting(20);
  put_all(100, 102);
  store->clear();
  put_all(102, 104);
  old_lets_go();
  ASSERT_TRUE(attached());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "miss") << i;
  EXPECT_EQ(get(101), "miss");
  EXPECT_EQ(get(103), "hit");
  flush();
  EXPECT_EQ(store->stats().nvme_live_bytes, 2 * (kPayload + kPageBytes)) << "a crash now brings nothing back";
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 2u);
}

TEST_F(TakeOver, ClearedWhileRecordsComeIn) {
  attach_slice = 4;
  start_waiting(20);
  SeqPointScope scope;
  SeqPoints::hold(kSlice);
  old_lets_go();
  ASSERT_TRUE(SeqPoints::wait_until_reached(kSlice, 60s));
  store->clear();
  SeqPoints::release(kSlice);
  ASSERT_TRUE(attached());
  EXPECT_EQ(store->stats().index_entries, 0u);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "miss") << i;
  EXPECT_TRUE(becomes([&] { return store->stats().nvme_live_bytes == 0; })) << "a crash now brings nothing back";
  flush();
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 0u);
}

TEST_F(TakeOver, ClosedBetweenOpenAndAttached) {
  start_waiting(20);
  SeqPointScope scope;
  SeqPoints::hold(kBefore);
  old_lets_go();
  ASSERT_TRUE(SeqPoints::wait_until_reached(kBefore, 60s));
  std::jthread closing([&] { EXPECT_TRUE(store->close(10s).ok()); });
  SeqPoints::release(kBefore);
  closing.join();
  store.reset();
  open();
  EXPECT_TRUE(store->nvme_ready());
  EXPECT_EQ(store->stats().recovered_chunks, 20u);
}

TEST_F(TakeOver, WhatCannotBeOpenedThenIsDoneWithout) {
  open();
  put_all(0, 2);
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  auto owner = nvme::Directory::open(options.directories[0], 0ms);
  ASSERT_TRUE(owner.ok());
  begin();
  std::ofstream(options.directories[0] + "/superblock") << "not one";
  owner.value().reset();
  ASSERT_TRUE(becomes([&] { return store->stats().nvme_waiting == 0; }));
  EXPECT_FALSE(store->nvme_ready());
  EXPECT_NE(store->nvme_warning().find("superblock"), std::string::npos) << store->nvme_warning();
  EXPECT_TRUE(put(7));
  EXPECT_EQ(get(7), "hit");
  EXPECT_TRUE(store->close(10s).ok());
}

TEST_F(TakeOver, AFailureThatMayPassIsTriedAgain) {
  start_waiting(20);
  const io::FaultyEngine::FaultId unreadable = watched[0]->add(io::Fault::fail_with(EIO).on(io::Op::kRead));
  old_lets_go();
  ASSERT_TRUE(becomes([&] { return store->nvme_warning().find("Input/output error") != std::string::npos; }))
      << store->nvme_warning();
  EXPECT_EQ(store->stats().nvme_waiting, 1u);
  EXPECT_TRUE(put(100));
  EXPECT_EQ(get(100), "hit");
  watched[0]->remove(unreadable);
  ASSERT_TRUE(attached());
  EXPECT_EQ(store->nvme_warning(), "");
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(TakeOver, OnceTheLockIsHeldTheWarningNamesNoOwner) {
  start_waiting(20);
  SeqPointScope scope;
  SeqPoints::hold(kReading);
  old_lets_go();
  ASSERT_TRUE(SeqPoints::wait_until_reached(kReading, 60s));
  EXPECT_EQ(store->nvme_warning(), "running without NVMe until its index is read");
  EXPECT_EQ(store->stats().nvme_waiting, 1u);
  SeqPoints::release(kReading);
  ASSERT_TRUE(attached());
}

TEST_F(TakeOver, ClosedWhileTheIndexIsRead) {
  start_waiting(20);
  SeqPointScope scope;
  SeqPoints::hold(kReading);
  old_lets_go();
  for (int part = 0; part < 2; ++part) {
    ASSERT_TRUE(SeqPoints::wait_until_reached(kReading, 60s));
    SeqPoints::step(kReading);
  }
  ASSERT_TRUE(SeqPoints::wait_until_reached(kReading, 60s));
  const std::uint64_t requests = requests_to_disk();
  EXPECT_GT(requests, 0u);
  std::jthread closing([&] { EXPECT_TRUE(store->close(10s).ok()); });
  ASSERT_TRUE(becomes([&] { return store->taker.get_stop_token().stop_requested(); }));
  SeqPoints::release(kReading);
  closing.join();
  EXPECT_EQ(requests_to_disk(), requests) << "nothing more is read";
  store.reset();
  open();
  EXPECT_EQ(store->stats().recovered_chunks, 20u);
}

TEST_F(TakeOver, TheNewLimitHolds) {
  start_waiting(1);
  std::swap(store, old);
  for (int i = 0; i < 600; ++i) {
    put(i);
    if (i % 32 == 0) flush();
  }
  std::swap(store, old);
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  options.nvme_bytes = 32 << 20;
  begin();
  ASSERT_GT(old->stats().nvme_allocated_bytes, options.nvme_bytes);
  old_lets_go();
  ASSERT_TRUE(attached());
  EXPECT_EQ(store->stats().nvme_limit_bytes, options.nvme_bytes);
  EXPECT_LE(store->stats().nvme_allocated_bytes, options.nvme_bytes);
  struct stat data{};
  ASSERT_EQ(::stat((options.directories[0] + "/data.000").c_str(), &data), 0);
  EXPECT_LE(static_cast<std::uint64_t>(data.st_blocks) * 512, options.nvme_bytes);
}

TEST_F(TakeOver, AllPathsOrNone) {
  options.directories = {(root / "a").string(), (root / "b").string()};
  open();
  put_all(0, 20);
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  auto second = nvme::Directory::open(options.directories[1], 0ms);
  ASSERT_TRUE(second.ok());
  const auto before = content(options.directories[0]);
  SeqPointScope scope;
  SeqPoints::hold(kTry);
  begin();
  for (int tries = 0; tries < 2; ++tries) {
    ASSERT_TRUE(SeqPoints::wait_until_reached(kTry, 60s));
    EXPECT_TRUE(nvme::Directory::open(options.directories[0], 0ms).ok()) << "the free one is not kept from others";
    SeqPoints::step(kTry);
  }
  EXPECT_EQ(content(options.directories[0]), before);
  EXPECT_EQ(requests_to_disk(), 0u) << "nor is it read";
  SeqPoints::release(kTry);
  second.value().reset();
  ASSERT_TRUE(attached());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(TakeOver, BesideEverythingElse) {
  attach_slice = 3;
  start_waiting(40);
  std::atomic<bool> stop{false};
  std::vector<std::jthread> others;
  for (int t = 0; t < 3; ++t) {
    others.emplace_back([&, t] {
      for (int i = 0; !stop.load(); ++i) {
        const int at = t == 0 ? i % 40 : 1000 + 500 * t + i % 200;
        put(at);
        EXPECT_NE(get(at), "wrong");
        static_cast<void>(store->stats());
        static_cast<void>(store->nvme_warning());
        static_cast<void>(store->io_engine_note());
        static_cast<void>(store->locate(keys(0, 40)));
        if (i % 16 == 0) store->erase(key(at));
      }
    });
  }
  old_lets_go();
  EXPECT_TRUE(attached());
  const std::uint64_t demoted = store->stats().demoted_chunks;
  EXPECT_TRUE(becomes([&] { return store->stats().demoted_chunks > demoted; }));
  stop.store(true);
  others.clear();
  flush();
  EXPECT_LE(store->stats().nvme_allocated_bytes, options.nvme_bytes);
  ASSERT_TRUE(store->close(10s).ok());
}

}  // namespace
}  // namespace lmcn
