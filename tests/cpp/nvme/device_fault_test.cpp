// Devices that do not answer, file systems that are not local, checkpoints that cannot be written, files that change under us.
#include <linux/magic.h>
#include <sys/statfs.h>

#include <thread>

#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

using namespace std::chrono_literals;
using Lane = InFlight::Lane;
using Time = InFlight::Clock::time_point;

// --- how long the device has owed an answer

constexpr Time at(std::chrono::seconds s) {
  return Time(1000s + s);
}

TEST(DeviceSilence, CountsFromTheBeginOfWhatIsUnderWay) {
  InFlight io;
  EXPECT_EQ(io.silence(at(100s)), 0s);
  const auto read = io.enter(Lane::kRead, at(1s));
  EXPECT_EQ(io.silence(at(31s)), 30s);
  io.leave(read, at(31s));
  EXPECT_EQ(io.silence(at(500s)), 0s) << "nothing is under way";
}

TEST(DeviceSilence, ALongQueueOfASlowDeviceIsNotSilence) {
  InFlight io;
  std::vector<InFlight::Ticket> queue;
  for (int i = 0; i < 100; ++i) queue.push_back(io.enter(Lane::kRead, at(0s)));
  for (int i = 0; i < 99; ++i) {
    io.leave(queue[static_cast<std::size_t>(i)], at(std::chrono::seconds(10 * (i + 1))));
    EXPECT_LE(io.silence(at(std::chrono::seconds(10 * (i + 1) + 9))), 10s) << i;
  }
  EXPECT_EQ(io.silence(at(990s + 30s)), 30s) << "the last one";
}

TEST(DeviceSilence, AWriteWaitsBehindReads) {
  InFlight io;
  const auto write = io.enter(Lane::kWrite, at(0s));
  auto read = io.enter(Lane::kRead, at(0s));
  for (int s = 1; s < 100; ++s) {
    io.leave(read, at(std::chrono::seconds(s)));
    read = io.enter(Lane::kRead, at(std::chrono::seconds(s)));
    EXPECT_LE(io.silence(at(std::chrono::seconds(s))), 1s);
  }
  io.leave(read, at(100s));
  EXPECT_EQ(io.silence(at(140s)), 40s);
  io.leave(write, at(140s));
}

TEST(DeviceSilence, WhatALaterOneOvertookWasAtTheDeviceThen) {
  InFlight io;
  const auto lost = io.enter(Lane::kWrite, at(0s));
  for (int s = 1; s < 50; ++s) {
    io.leave(io.enter(Lane::kWrite, at(std::chrono::seconds(s))), at(std::chrono::seconds(s)));
    io.leave(io.enter(Lane::kRead, at(std::chrono::seconds(s))), at(std::chrono::seconds(s)));
  }
  EXPECT_EQ(io.silence(at(50s)), 49s) << "since the first write that came later and ended";
  io.leave(lost, at(50s));
  EXPECT_EQ(io.silence(at(50s)), 0s);
}

// They take long where there is much to write, on a device that answers all the while.
TEST(DeviceSilence, SyncsAndSystemCallsCountFromTheLastAnswer) {
  for (const Lane lane : {Lane::kSync, Lane::kDirect}) {
    InFlight io;
    const auto slow = io.enter(lane, at(0s));
    EXPECT_EQ(io.silence(at(20s)), 20s);
    for (const Lane other : {Lane::kRead, Lane::kWrite, Lane::kSync}) {
      io.leave(io.enter(other, at(39s)), at(40s));
      EXPECT_EQ(io.silence(at(41s)), 1s);
    }
    if (lane == Lane::kDirect) io.leave(io.enter(lane, at(41s)), at(42s));  // perhaps from memory
    EXPECT_EQ(io.silence(at(70s)), 30s);
    io.excuse(at(70s));
    EXPECT_EQ(io.silence(at(71s)), 1s);
    io.leave(slow, at(71s));
    EXPECT_EQ(io.silence(at(71s)), 0s);
  }
}

TEST(DeviceSilence, NothingIsExcusedForEverByWhatElseIsAnswered) {
  for (const Lane lane : {Lane::kRead, Lane::kWrite, Lane::kSync, Lane::kDirect}) {
    InFlight io;
    const auto lost = io.enter(lane, at(0s));
    const auto answer = [&](std::chrono::seconds s) {
      const Lane other = lane == Lane::kRead ? Lane::kWrite : Lane::kRead;
      io.leave(io.enter(other, at(s)), at(s));
      return io.silence(at(s), 120s);
    };
    for (auto s = 1s; s <= 120s; s += 1s) {
      const auto silence = answer(s);
      EXPECT_EQ(silence, lane == Lane::kRead ? s : 0s);
    }
    EXPECT_EQ(answer(121s), 121s);
    io.excuse(at(121s));
    EXPECT_LE(io.silence(at(122s), 120s), 1s);
    io.leave(lost, at(122s));
  }
}

// --- a log whose device stops answering

using DeviceFaults = LogFixture;

TEST_F(DeviceFaults, ADeviceThatDoesNotAnswerIsQuarantinedAndItsReadEndsLate) {
  options.io_timeout = 1ms;
  open();
  put_many(0, 2);
  engine->add(io::Fault::hold().on(io::Op::kRead));
  PageBuffer image(index[0].pages);
  std::promise<Status> done;
  log->read(index[0], image.data(), key_of(0), &kTestNamespace, [&](const Status& status) { done.set_value(status); });
  ASSERT_TRUE(engine->wait_withheld(1));
  const auto until = std::chrono::steady_clock::now() + 20s;
  while (!log->quarantined() && std::chrono::steady_clock::now() < until) log->check_deadlines();
  EXPECT_EQ(log->quarantine_reason(), "no answer for 1 ms from " + file("data.000").string());
  EXPECT_EQ(get(1).code(), Code::kUnavailable) << "no I/O is begun any more";
  engine->clear();
  EXPECT_EQ(engine->release(), 1u);
  EXPECT_TRUE(done.get_future().get().ok()) << "the answer still reaches whoever waits for it";
}

TEST_F(DeviceFaults, TheKeepersOwnCallsAreWatchedToo) {
  options.io_timeout = 1ms;
  for (const io::Op op : {io::Op::kSync, io::Op::kWrite}) {
    open();
    put_many(0, 2);
    idle();
    engine->add(io::Fault::hold().on(op));
    std::jthread keeper([&] { static_cast<void>(checkpoint()); });  // as long as the device likes
    ASSERT_TRUE(engine->wait_withheld(1));
    const auto until = std::chrono::steady_clock::now() + 20s;
    while (!log->quarantined() && std::chrono::steady_clock::now() < until) log->check_deadlines();
    EXPECT_TRUE(log->quarantined());
    engine->clear();
    engine->release();
    keeper.join();
    kill();
  }
}

TEST_F(DeviceFaults, AWriteThatIsNeverAnsweredAmongReadsThatAre) {
  options.io_timeout = 250ms;
  open();
  put_many(0, 2);
  idle();
  engine->add(io::Fault::hold().on(io::Op::kWrite));
  std::jthread keeper([&] { static_cast<void>(checkpoint()); });
  ASSERT_TRUE(engine->wait_withheld(1));
  const auto until = std::chrono::steady_clock::now() + 10s;
  while (!log->quarantined() && std::chrono::steady_clock::now() < until) {
    static_cast<void>(get(1));
    log->check_deadlines();
  }
  EXPECT_TRUE(log->quarantined());
  engine->clear();
  engine->release();
}

TEST_F(DeviceFaults, ADeviceThatAnswersInTimeIsNot) {
  open();  // 30 s
  put_many(0, 2);
  engine->add(io::Fault::hold().on(io::Op::kRead));
  PageBuffer image(index[0].pages);
  std::promise<Status> done;
  log->read(index[0], image.data(), key_of(0), &kTestNamespace, [&](const Status& status) { done.set_value(status); });
  ASSERT_TRUE(engine->wait_withheld(1));
  for (int i = 0; i < 3; ++i) log->check_deadlines();
  EXPECT_FALSE(log->quarantined());
  engine->clear();
  engine->release();
  EXPECT_TRUE(done.get_future().get().ok());
}

// --- network file systems

std::atomic<long> pretended_type{0};
int pretend(int fd, struct statfs* found) {
  const int result = ::fstatfs(fd, found);
  found->f_type = static_cast<decltype(found->f_type)>(pretended_type.load());
  return result;
}

class NetworkFileSystem : public LogFixture {
 protected:
  NetworkFileSystem() { fstatfs_call = pretend; }
  ~NetworkFileSystem() override { fstatfs_call = ::fstatfs; }
};

TEST_F(NetworkFileSystem, IsRefusedUnlessAskedFor) {
  const std::pair<long, const char*> kinds[] = {
      {NFS_SUPER_MAGIC, "NFS"},   {SMB_SUPER_MAGIC, "SMB"},
      {CIFS_SUPER_MAGIC, "SMB"},  {SMB2_SUPER_MAGIC, "SMB"},
      {CEPH_SUPER_MAGIC, "Ceph"}, {AFS_SUPER_MAGIC, "AFS"},
      {AFS_FS_MAGIC, "AFS"},      {0x0BD00BD0, "Lustre"},
      {0x47504653, "GPFS"},       {0x01021997, "9p"},
      {0x19830326, "BeeGFS"},     {0x7461636F, "OCFS2"},
      {0x01161970, "GFS2"},       {static_cast<int>(CIFS_SUPER_MAGIC), "SMB"}};  // as a machine of 32 bits says it
  for (const auto& [type, name] : kinds) {
    pretended_type = type;
    const Status refused = try_open();
    EXPECT_EQ(refused.code(), Code::kInvalidArgument) << name;
    for (const std::string& part : {std::string(name), options.directory, std::string("allow_network_file_system")}) {
      EXPECT_NE(refused.message().find(part), std::string::npos) << refused.message();
    }
    EXPECT_TRUE(std::filesystem::is_empty(options.directory)) << name;
  }
  options.allow_network_file_system = true;
  open();
  put_many(0, 2);
  expect_readable(0, 2);
}

TEST_F(NetworkFileSystem, LocalOnesAreNot) {
  const long local[] = {EXT4_SUPER_MAGIC,      XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC,
                        OVERLAYFS_SUPER_MAGIC, 0x2FC12FC1,      0x65735546};
  for (const long type : local) {
    pretended_type = type;
    EXPECT_TRUE(try_open().ok()) << std::hex << type;
    kill();
  }
}

// --- checkpoints

// Space for a checkpoint is not set aside: that it runs out says nothing of the data file.
TEST_F(DeviceFaults, ACheckpointWithoutRoomIsLostAndNothingElse) {
  open();
  put_many(0, 3);
  idle();
  std::uint64_t failed = 0;
  for (const int error : {ENOSPC, EDQUOT}) {
    for (const io::Op op : {io::Op::kWrite, io::Op::kSync}) {
      // The first sync of a checkpoint is the data file's.
      engine->add(io::Fault::fail_with(error).on(op).only(op == io::Op::kSync ? 2 : 1));
      const Status lost = checkpoint();
      EXPECT_EQ(lost.sys_errno(), error) << lost.to_string();
      EXPECT_NE(lost.message().find("index.ckpt.tmp"), std::string::npos) << lost.message();
      EXPECT_FALSE(log->quarantined()) << lost.message();
      EXPECT_EQ(log->stats().write_errors, ++failed);
      EXPECT_FALSE(std::filesystem::exists(file("index.ckpt.tmp")));
      engine->clear();
    }
  }
  put_many(3, 5);
  ASSERT_TRUE(checkpoint().ok()) << "a later one";
  kill_and_open();
  EXPECT_EQ(log->stats().recovered_from_checkpoint, 5u);
  expect_readable(0, 5);
}

TEST_F(DeviceFaults, ACheckpointsDeviceErrorsQuarantine) {
  for (const int error : {EIO, EROFS}) {
    open();
    put_many(0, 1);
    idle();
    engine->add(io::Fault::fail_with(error).on(io::Op::kWrite).only(1));
    EXPECT_EQ(checkpoint().sys_errno(), error);
    EXPECT_TRUE(log->quarantined()) << error;
    engine->clear();
    kill();
  }
}

// --- files that change under us

TEST_F(DeviceFaults, ADirectoryThatIsDeletedCostsTheCheckpointsOnly) {
  open();
  put_many(0, 3);
  std::filesystem::remove_all(options.directory);
  EXPECT_EQ(checkpoint().code(), Code::kNotFound);
  EXPECT_EQ(log->stats().write_errors, 1u);
  EXPECT_FALSE(log->quarantined());
  expect_readable(0, 3);  // the open file lives
  put_many(3, 5);
  expect_readable(3, 5);
  EXPECT_EQ(close().code(), Code::kNotFound);
  open();
  EXPECT_TRUE(recovered.empty()) << "a new store";
}

TEST_F(DeviceFaults, ADataFileCutUnderUsIsMissesThenQuarantine) {
  open();
  put_many(0, 23 * 3);
  idle();  // a header on its way would make the file long again
  std::filesystem::resize_file(file("data.000"), kMiB);
  expect_readable(0, 23);
  for (std::uint32_t id = 23; id < 23 + 8; ++id) EXPECT_FALSE(get(id).ok());
  EXPECT_TRUE(log->quarantined()) << "a device that reads nothing";
  EXPECT_NE(log->quarantine_reason().find("data.000"), std::string::npos);
  kill_and_open();
  expect_no_lies();
  expect_readable(0, 23);
}

// What is written behind the cut is read back whole, what lay there is zeros: a miss, never other bytes.
TEST_F(DeviceFaults, ADataFileCutUnderUsNeverLies) {
  open();
  put_many(0, 23 * 2);
  std::filesystem::resize_file(file("data.000"), kMiB + 8 * kPageBytes);
  for (std::uint32_t id = 46; id < 46 + 23 * 5; ++id) {
    static_cast<void>(put(id));
    for (const std::uint32_t other : {id, id - 46}) {
      const Status found = get(other);
      EXPECT_NE(found.code(), Code::kInternal) << found.to_string();
    }
  }
}

// As a file system that the kernel made read-only after an error.
TEST_F(DeviceFaults, ReadOnlyFromOneMomentToTheNext) {
  open();
  put_many(0, 3);
  idle();
  engine->add(io::Fault::fail_with(EROFS).on(io::Op::kWrite));
  engine->add(io::Fault::fail_with(EROFS).on(io::Op::kSync));
  EXPECT_FALSE(put(3).ok());
  EXPECT_TRUE(log->quarantined());
  EXPECT_NE(log->quarantine_reason().find("Read-only"), std::string::npos) << log->quarantine_reason();
  EXPECT_EQ(get(0).code(), Code::kUnavailable);
  EXPECT_EQ(close().code(), Code::kUnavailable);
  engine->clear();
  open();
  EXPECT_EQ(recovered.size(), 3u);
  expect_readable(0, 3);
}

}  // namespace
}  // namespace lmcn::nvme
