// Whatever the device does, the engine goes on: requests become misses, nothing leaks, a line and a metric tell.
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <future>
#include <thread>

#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

// Longer than a busy machine's disk takes: what a test did not hold must never look silent.
constexpr auto kSilence = std::chrono::seconds(2);

class DeviceFaultTest : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    with_nvme();
    wrap_engine = [this](std::unique_ptr<io::IoEngine> real) {
      auto made = std::make_unique<io::FaultyEngine>(std::move(real));
      faulty = made.get();
      return made;
    };
  }
  void TearDown() override {
    if (store) {
      faulty->clear();
      faulty->release();
    }
    StoreTest::TearDown();
  }
  bool quarantined() const { return store->stats().nvme_quarantined == 1; }
  /// Host memory alone still serves.
  void expect_host_goes_on(int first) {
    put_all(first, first + 20);
    for (int i = first; i < first + 20; ++i) EXPECT_EQ(get(i), "hit") << i;
  }

  io::FaultyEngine* faulty = nullptr;
};

TEST_F(DeviceFaultTest, ASilentDeviceIsQuarantinedAndItsSlotsComeFreeWhenItAnswers) {
  options.nvme_io_timeout = kSilence;
  open();
  put_all(0, 8);
  reopen();
  faulty->add(io::Fault::hold().on(io::Op::kRead));
  auto request = store->begin_request(ns, {});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(request->lookup(key(i)), Presence::kRetry);
  ASSERT_TRUE(faulty->wait_withheld(4));
  ASSERT_TRUE(becomes([&] { return !store->nvme_ready(); }));

  EXPECT_NE(store->nvme_warning().find("no answer for 2 s from " + options.directories[0]), std::string::npos)
      << store->nvme_warning();
  EXPECT_TRUE(quarantined());
  EXPECT_EQ(store->lookup(keys(4, 8)).hit, 0u);
  EXPECT_EQ(get(5), "miss");
  EXPECT_EQ(request->lookup(key(6)), Presence::kMiss);
  expect_host_goes_on(100);
  request.reset();
  EXPECT_EQ(store->stats().promotions_in_flight, 4u);
  EXPECT_EQ(store->stats().host_pinned_slots, 4u) << "the device may still write there";

  faulty->clear();
  EXPECT_EQ(faulty->release(), 4u);
  EXPECT_TRUE(becomes([&] { return store->stats().promotions_in_flight == 0; }));
  EXPECT_EQ(store->stats().host_pinned_slots, 0u);
  expect_host_goes_on(200);
}

// The keeper waits in an fdatasync: what it would do else is done by the promoter.
TEST_F(DeviceFaultTest, WhileTheKeeperWaitsForTheDeviceIdleRequestsStillLoseTheirPins) {
  options.nvme_io_timeout = kSilence;
  options.request_ttl = 200ms;
  open();
  put_all(0, 2);
  flush();
  faulty->add(io::Fault::hold().on(io::Op::kSync));
  auto request = store->begin_request(ns, {});
  ASSERT_EQ(request->lookup(key(0)), Presence::kHit);
  put_all(2, 3);
  EXPECT_EQ(store->flush(0ms).code(), Code::kDeadlineExceeded);
  ASSERT_TRUE(faulty->wait_withheld(1));
  EXPECT_TRUE(becomes([&] { return quarantined(); }));
  EXPECT_TRUE(becomes([&] { return store->stats().host_pinned_slots == 0; }));
  EXPECT_FALSE(store->flush(10ms).ok()) << "bounded though the device is not";
  expect_host_goes_on(100);
  request.reset();
}

// close() waits for the device, as documented; what it was to flush is lost at its deadline.
TEST_F(DeviceFaultTest, CloseWaitsForWhatIsUnderWay) {
  options.nvme_io_timeout = kSilence;
  open();
  faulty->add(io::Fault::hold().on(io::Op::kWrite));
  put_all(0, 1);
  ASSERT_TRUE(faulty->wait_withheld(1));
  std::promise<Status> closed;
  auto outcome = closed.get_future();
  std::jthread closing([&] { closed.set_value(store->close(10ms)); });
  EXPECT_TRUE(becomes([&] { return store->reserve(ns, keys(1, 2), kPayload, false).status().code() == Code::kUnavailable; }));
  EXPECT_EQ(outcome.wait_for(0s), std::future_status::timeout);
  faulty->clear();
  faulty->release();
  EXPECT_EQ(outcome.get().code(), Code::kDeadlineExceeded);
}

TEST_F(DeviceFaultTest, EveryErrorThatEndsWritingLeavesHostMemory) {
  for (const int error : {EIO, ENOSPC, EDQUOT, EROFS, ENODEV}) {
    open();
    const int first = error * 1000;
    faulty->add(io::Fault::fail_with(error).on(io::Op::kWrite));
    put_all(first, first + 4);
    ASSERT_TRUE(becomes([&] { return quarantined(); })) << error;
    EXPECT_FALSE(store->nvme_ready());
    EXPECT_NE(store->nvme_warning().find(std::string("(").append(std::to_string(error)).append(")")), std::string::npos)
        << store->nvme_warning();
    EXPECT_GE(store->stats().write_errors, 1u);
    for (int i = first; i < first + 4; ++i) EXPECT_EQ(get(i), "hit") << i;
    expect_host_goes_on(first + 100);
    EXPECT_TRUE(becomes([&] { return store->stats().nvme_dirty_bytes == 0; })) << "what is not written is given up";
    EXPECT_EQ(store->stats().host_pinned_slots, 0u);
    faulty->clear();
    store.reset();
    std::filesystem::remove_all(options.directories[0]);
  }
}

TEST_F(DeviceFaultTest, ShortIoIsAMiss) {
  open();
  faulty->add(io::Fault::short_by(kPageBytes).on(io::Op::kWrite).in_range(0, 1 << 30).only(3));
  put_all(0, 8);
  flush();
  faulty->clear();
  reopen();
  faulty->add(io::Fault::short_by(1).on(io::Op::kRead).only(2));
  int misses = 0;
  for (int i = 0; i < 8; ++i) {
    const std::string found = get(i);
    EXPECT_NE(found, "wrong") << i;
    misses += found == "miss" ? 1 : 0;
  }
  EXPECT_GE(misses, 1);
  EXPECT_LE(misses, 2);
  EXPECT_FALSE(quarantined());
  EXPECT_EQ(store->stats().read_errors, 1u);
  EXPECT_EQ(store->stats().host_pinned_slots, 0u);
}

TEST_F(DeviceFaultTest, ADirectoryDeletedUnderUsIsToldAndTheEngineGoesOn) {
  open();
  put_all(0, 4);
  flush();
  std::filesystem::remove_all(options.directories[0]);
  put_all(4, 8);
  EXPECT_EQ(store->flush(20s).code(), Code::kNotFound) << "the checkpoint has no place";
  EXPECT_GE(store->stats().write_errors, 1u);
  EXPECT_FALSE(quarantined());
  evict_all(1000);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(get(i), "hit") << i;  // the open file lives on
  EXPECT_EQ(store->close(20s).code(), Code::kNotFound);
  store.reset();
  open();
  EXPECT_EQ(get(0), "miss");
}

TEST_F(DeviceFaultTest, ADataFileCutUnderUsIsMisses) {
  open();
  put_all(0, 200);
  flush();
  std::filesystem::resize_file(std::filesystem::path(options.directories[0]) / "data.000", 4 << 20);
  evict_all(1000);
  int hits = 0;
  for (int i = 0; i < 200; ++i) {
    const std::string found = get(i);
    EXPECT_NE(found, "wrong") << i;
    hits += found == "hit" ? 1 : 0;
  }
  EXPECT_GT(hits, 0);
  EXPECT_LT(hits, 200);
  expect_host_goes_on(5000);
}

TEST_F(DeviceFaultTest, ACheckpointWithoutRoomIsWrittenByTheNextFlush) {
  open();
  put_all(0, 2);
  flush();
  // Writes of records lie in the data file's first gigabyte and are larger than a page.
  const auto rule = faulty->add(io::Fault::fail_with(ENOSPC).on(io::Op::kSync).only(2));
  put_all(2, 3);
  const Status lost = store->flush(20s);
  EXPECT_EQ(lost.sys_errno(), ENOSPC) << lost.to_string();
  EXPECT_FALSE(quarantined()) << store->nvme_warning();
  EXPECT_GE(store->stats().write_errors, 1u);
  faulty->remove(rule);
  flush();
  EXPECT_EQ(get(2), "hit");
}

TEST_F(DeviceFaultTest, TwoStoresOnOnePathShareNothing) {
  open();
  put_all(0, 2);
  flush();
  StoreOptions second = options;
  second.lock_wait = 0ms;
  auto without = TieredStore::open(second);
  ASSERT_TRUE(without.ok());
  EXPECT_FALSE((*without)->nvme_ready());
  EXPECT_NE((*without)->nvme_warning().find("pid " + std::to_string(::getpid())), std::string::npos);
  EXPECT_EQ((*without)->lookup(keys(0, 2)).hit, 0u);
  (*without)->clear();  // of its own memory
  without.value().reset();
  reopen();
  EXPECT_EQ(get(0), "hit");
}

// A file system cannot be remounted under a file that is open for writing (the kernel does it after an error: then EROFS comes from
// the device, as above). So it happens while nobody has the store open. In a child with mounts of its own.
TEST_F(DeviceFaultTest, AReadOnlyFileSystemIsRefusedNamingTheDirectory) {
  std::filesystem::create_directory(root / "mount");
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    const std::string at = (root / "mount").string();
    if (::unshare(CLONE_NEWNS) != 0 || ::mount("", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("lmcn", at.c_str(), "tmpfs", 0, "size=1g") != 0) {
      ::_exit(77);
    }
    options.directories = {at + "/nvme"};
    open();
    if (!put(0) || !store->flush(20s).ok()) ::_exit(1);
    const unsigned long read_only = MS_REMOUNT | MS_RDONLY;
    if (::mount("", at.c_str(), nullptr, read_only, nullptr) == 0 || errno != EBUSY) ::_exit(2);
    store.reset();
    if (::mount("", at.c_str(), nullptr, read_only, nullptr) != 0) ::_exit(3);
    const auto refused = TieredStore::open(options);
    if (refused.status().code() != Code::kInvalidArgument) ::_exit(4);
    if (refused.status().message().find(options.directories[0]) == std::string::npos) ::_exit(5);
    if (::mount("", at.c_str(), nullptr, MS_REMOUNT, nullptr) != 0) ::_exit(6);
    open();
    ::_exit(get(0) == "hit" ? 0 : 7);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << status;
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "this process may not mount";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace lmcn
