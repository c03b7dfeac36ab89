// What a loader does when GPUDirect Storage fails it, with a plugin that fails as it is told.
#include <atomic>
#include <filesystem>

#include "copy/device_load_files.hpp"
#include "fake_gds.hpp"
#include "load_fixture.hpp"

namespace lmcn::load_test {
namespace {

class Fallback : public LoadFixture {
 protected:
  Fallback() {
    fake_gds().fault = Fault::kNone;
    fake_gds().compat = true;
    fake_gds().reads = fake_gds().hanging = 0;
    loading.plugin = &kFakeGds;
  }
  ~Fallback() override {
    set(Fault::kNone);
    loader.reset();
    fake_gds().on_call = fake_gds().on_read = nullptr;
    fake_gds().hang_path.clear();
    end_late();
    release_lost();
    EXPECT_EQ(fake_gds().open_files, 0);
    EXPECT_EQ(fake_gds().readers, 0);
  }
  static void set(Fault fault) {
    fake_gds().fault = fault;
    fake_gds().fault.notify_all();
  }
  DeviceLoadJob job_of(std::uint64_t id, std::uint32_t first, std::uint32_t count) {
    DeviceLoadJob job{.id = id};
    for (std::uint32_t i = first; i < first + count; ++i) add(job, write(i));
    return job;
  }
  void expect_all(const DeviceLoadJob& job, std::uint32_t first) {
    for (std::uint32_t i = 0; i < job.items.size(); ++i) expect_loaded(job, i, first + i);
  }
};

class FailedRead : public Fallback, public testing::WithParamInterface<Fault> {};
INSTANTIATE_TEST_SUITE_P(, FailedRead, testing::Values(Fault::kRead, Fault::kReadEnded));

TEST_P(FailedRead, WhereODirectDoesNotEndsGdsWithOneLine) {
  make_loader();
  EXPECT_EQ(loader->name(), "none");
  DeviceLoadJob job = job_of(1, 0, 3);
  expect_all(job, 0);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(fake_gds().reads, 3);
  EXPECT_EQ(loader->name(), "gds-compat");
  EXPECT_FALSE(loader->gds_given_up());
  set(GetParam());
  job = job_of(2, 3, 6);
  expect_all(job, 3);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(loader->name(), "host");
  EXPECT_TRUE(loader->gds_given_up());
  const std::vector<std::string> notes = loader->notes();
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_NE(notes[0].find("DMA failed"), std::string::npos) << notes[0];
  EXPECT_NE(notes[0].find(file("data.000").string()), std::string::npos) << notes[0];
  EXPECT_TRUE(loader->notes().empty());
  const int reads = fake_gds().reads;
  set(Fault::kNone);
  job = job_of(3, 9, 2);
  expect_all(job, 9);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(fake_gds().reads, reads) << "GDS was given up, and is asked again";
  expect_pages();
}

TEST_F(Fallback, AFileThatGdsDoesNotServe) {
  set(Fault::kOpen);
  make_loader();
  const DeviceLoadJob job = job_of(1, 0, 2);
  expect_all(job, 0);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(loader->name(), "host");
  const std::vector<std::string> notes = loader->notes();
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_NE(notes[0].find("file system not supported"), std::string::npos) << notes[0];
  expect_pages();
}

TEST_F(Fallback, WhatAFailedReadStillWritesReachesNoPageAndNoMemoryOfOthers) {
  make_loader();
  set(Fault::kRead);
  SeqPointScope scope;
  SeqPoints::hold("device_load.moving");
  const DeviceLoadJob job = job_of(1, 0, 6);
  expect_all(job, 0);
  ASSERT_TRUE(loader->submit(job).ok());
  ASSERT_TRUE(SeqPoints::wait_until_reached("device_load.moving", 60s));
  EXPECT_GT(write_late(), 0u);  // into what is verified, and about to be copied, were it the same memory
  SeqPoints::release("device_load.moving");
  EXPECT_TRUE(result(1).ok);
  expect_pages();
  loader.reset();
  write_late();  // under AddressSanitizer: not into memory that was given back
}

TEST_F(Fallback, MemoryThatReadsMayStillWriteIsBounded) {
  make_loader();  // four lanes
  const DeviceLoadItem good = write(0);
  DeviceLoadItem cut = good;
  cut.path = (root.path() / "cut").string();
  idle();
  for (std::uint64_t failures = 1; failures <= 3; ++failures) {
    std::filesystem::remove(cut.path);
    std::filesystem::copy_file(good.path, cut.path);
    // The file ends under the read, so that neither GDS nor O_DIRECT has it.
    fake_gds().on_read = [&] { std::filesystem::resize_file(cut.path, cut.offset + kPageBytes); };
    set(Fault::kRead);
    DeviceLoadJob job{.id = failures};
    add(job, cut);
    expect_failed(load(job), 0, Code::kIoError, "it ends at byte");
    EXPECT_EQ(write_late(), failures);
    EXPECT_EQ(loader->gds_given_up(), failures > 2) << failures;
    EXPECT_EQ(loader->notes().size(), failures == 3 ? 1u : 0u);
    set(Fault::kNone);
    fake_gds().on_read = nullptr;
    DeviceLoadJob next{.id = 10 + failures};
    add(next, good);
    expect_loaded(next, 0, 0);
    EXPECT_TRUE(load(next).ok);
    EXPECT_EQ(loader->name(), failures == 3 ? "host" : "gds-compat");
  }
  expect_pages();
}

TEST_F(Fallback, WithoutMemoryThatNoReadMayStillWriteLoadsEndWithOneLine) {
  loading.buffer_bytes = static_cast<std::uint64_t>(slot.rank_bytes);  // of one record
  make_loader();
  set(Fault::kRead);
  const DeviceLoadDone done = load(job_of(1, 0, 2));
  ASSERT_EQ(done.failed.size(), 2u);
  for (const DeviceLoadFailure& one : done.failed) {
    EXPECT_EQ(one.status.code(), Code::kUnavailable);
    EXPECT_NE(one.status.message().find("no staging memory is left"), std::string::npos) << one.status.to_string();
  }
  EXPECT_TRUE(loader->gds_given_up());
  EXPECT_EQ(loader->notes().size(), 1u);
  expect_failed(load(job_of(2, 2, 1)), 0, Code::kUnavailable, "DMA failed");
  expect_pages();
}

TEST_F(Fallback, LoadersWhoseMemoryCannotBeGivenBackAreBounded) {
  for (int i = 0; i < 4; ++i) {
    set(Fault::kNone);
    make_loader();
    set(Fault::kRead);
    const DeviceLoadJob job = job_of(1, 0, 1);
    expect_all(job, 0);
    EXPECT_TRUE(load(job).ok);
    loader.reset();
  }
  const auto made = make_device_loader(layout, slot, loading);
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kUnavailable);
  EXPECT_NE(made.status().message().find("4 loaders of this process"), std::string::npos) << made.status().to_string();
  loading.plugin = nullptr;
  make_loader();
  expect_pages();
}

TEST_F(Fallback, ADriveThatHangsLeavesLanesToTheOthers) {
  loading.files = 2;
  make_loader();  // four lanes
  DeviceLoadJob hung{.id = 1}, job{.id = 2};
  for (std::uint32_t id = 0; id < 8; ++id) add(hung, write(id));
  for (std::uint32_t id = 0; id < 8; ++id) add(job, write(id));
  idle();
  const std::string other = (root.path() / "other").string();
  std::filesystem::copy_file(job.items[0].path, other);
  for (DeviceLoadItem& item : job.items) item.path = other;
  fake_gds().hang_path = hung.items[0].path;
  set(Fault::kHang);
  ASSERT_TRUE(loader->submit(hung).ok());
  for (int hanging = 0; hanging < 2; hanging = fake_gds().hanging) fake_gds().hanging.wait(hanging);
  expect_all(job, 0);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(fake_gds().hanging, 2);
  expect_pages();
  set(Fault::kNone);
  expect_all(hung, 0);
  EXPECT_TRUE(result(1).ok);
  expect_pages();
}

TEST_F(Fallback, WhatReadEachFileIsSaid) {
  make_loader();
  DeviceLoadItem item = write(0);
  const std::string first = item.path;
  DeviceLoadJob job{.id = 1};
  add(job, item);
  expect_loaded(job, 0, 0);
  EXPECT_TRUE(load(job).ok);
  EXPECT_EQ(loader->name(), "gds-compat");
  fake_gds().compat = false;
  item.path = (root.path() / "other").string();
  std::filesystem::copy_file(first, item.path);
  job = {.id = 2};
  add(job, item);
  expect_loaded(job, 0, 0);
  EXPECT_TRUE(load(job).ok);
  std::vector<DeviceLoadPath> paths = loader->paths();
  ASSERT_EQ(paths.size(), 2u);
  for (const DeviceLoadPath& path : paths) {
    EXPECT_EQ(path.name, path.path == first ? "gds-compat" : "gds");
    EXPECT_EQ(path.reason, "a fake");
  }
  EXPECT_EQ(loader->name(), "gds-compat");
  set(Fault::kReadEnded);
  job.id = 3;
  EXPECT_TRUE(load(job).ok);
  paths = loader->paths();
  ASSERT_EQ(paths.size(), 2u);
  for (const DeviceLoadPath& path : paths) {
    EXPECT_EQ(path.name, path.path == first ? "gds-compat" : "host");
    EXPECT_EQ(path.reason, path.path == first ? "a fake" : "DMA failed");
  }
  EXPECT_EQ(loader->name(), "host");
  expect_pages();
}

TEST_F(Fallback, WrongBytesAreAMissAndNotGivenToPages) {
  make_loader();
  set(Fault::kWrongBytes);
  const DeviceLoadJob job = job_of(1, 0, 3);
  const DeviceLoadDone done = load(job);
  ASSERT_EQ(done.failed.size(), 3u);
  for (const DeviceLoadFailure& one : done.failed) EXPECT_EQ(one.status.code(), Code::kCorruption);
  expect_pages();
}

TEST_F(Fallback, AReadThatHangsHoldsUpItsLaneOnly) {
  make_loader();
  set(Fault::kHang);
  DeviceLoadJob hung = job_of(1, 0, 2);
  hung.deadline = std::chrono::steady_clock::now() + 5ms;
  ASSERT_TRUE(loader->submit(hung).ok());
  const DeviceLoadDone late = result(1);
  ASSERT_EQ(late.failed.size(), 2u);
  for (const DeviceLoadFailure& one : late.failed) EXPECT_EQ(one.status.code(), Code::kDeadlineExceeded);

  // All lanes now: a job that no lane has taken ends at its deadline, too.
  DeviceLoadJob rest = job_of(2, 2, 6);
  rest.deadline = std::chrono::steady_clock::now() + 5ms;
  ASSERT_TRUE(loader->submit(rest).ok());
  EXPECT_EQ(result(2).failed.size(), 6u);
  set(Fault::kNone);  // what hung brings its bytes now: nobody wants them
  const DeviceLoadJob job = job_of(3, 8, 8);
  expect_all(job, 8);
  EXPECT_TRUE(load(job).ok);
  loader.reset();
  expect_pages();
}

TEST_F(Fallback, WithoutGdsThereIsNoLoaderUnlessCompatIsAllowed) {
  set(Fault::kMake);
  auto made = make_device_loader(layout, slot, loading);
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kUnavailable);
  EXPECT_NE(made.status().message().find("nvidia-fs is not loaded"), std::string::npos);
  set(Fault::kNone);
  loading.allow_compat = false;
  made = make_device_loader(layout, slot, loading);
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.status().code(), Code::kUnavailable);
  EXPECT_NE(made.status().message().find("no CUDA device"), std::string::npos);
}

// ---- the probe

class Probe : public Fallback {
 protected:
  Probe() {
    std::filesystem::create_directory(directory());
    probing.directory = directory().string();
    probing.bytes = 8 * kMiB;
    probing.in_flight = 3;
  }
  std::filesystem::path directory() const { return root.path() / "probed"; }
  void expect_no_scratch() const { EXPECT_TRUE(std::filesystem::is_empty(directory())); }
  GdsProbeOptions probing;
};

TEST_F(Probe, MeasuresTheHostPathWithoutAPlugin) {
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "none");
  EXPECT_EQ(probe->reason, "the plugin is not loaded");
  EXPECT_GT(probe->host_read, 0);
  EXPECT_GT(probe->host_write, 0);
  EXPECT_EQ(probe->gds_read, 0);
  EXPECT_FALSE(probe->use_gds());
  expect_no_scratch();
}

TEST_F(Probe, SaysCompatAndNeverUsesIt) {
  probing.plugin = &kFakeGds;
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "compat");
  EXPECT_NE(probe->reason.find("no CUDA device"), std::string::npos);
  EXPECT_GT(probe->gds_read, 0);
  EXPECT_GT(probe->gds_write, 0);
  EXPECT_FALSE(probe->use_gds());
  expect_no_scratch();
}

TEST_F(Probe, WhatReadsOtherBytesThanWereWrittenIsNotUsed) {
  probing.plugin = &kFakeGds;
  for (const Fault fault : {Fault::kWrongBytes, Fault::kRead, Fault::kOpen, Fault::kMake}) {
    set(fault);
    const Result<GdsProbe> probe = probe_gds(probing);
    ASSERT_TRUE(probe.ok()) << probe.status().to_string();
    EXPECT_EQ(probe->mode, "none");
    const char* const words = fault == Fault::kWrongBytes ? "gave other bytes than were written"
                              : fault == Fault::kRead     ? "DMA failed"
                              : fault == Fault::kOpen     ? "file system not supported"
                                                          : "nvidia-fs is not loaded";
    EXPECT_NE(probe->reason.find(words), std::string::npos) << probe->reason;
    EXPECT_EQ(probe->gds_read, 0);
    EXPECT_GT(probe->host_read, 0);
    EXPECT_FALSE(probe->use_gds());
    expect_no_scratch();
    EXPECT_EQ(write_late() > 0, fault == Fault::kRead);  // under AddressSanitizer: not into memory that was given back
    end_late();
  }
}

TEST_F(Probe, WritesNothingWithoutGdsWhereThatIsAsked) {
  probing.plugin = &kFakeGds;
  probing.measure_without_gds = false;
  int calls = 0;
  fake_gds().on_call = [&] { ++calls; };
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "compat");
  EXPECT_NE(probe->reason.find("no CUDA device"), std::string::npos);
  EXPECT_EQ(probe->host_write, 0);
  EXPECT_EQ(probe->gds_write, 0);
  EXPECT_EQ(calls, 2) << "make and open";
  expect_no_scratch();
}

TEST_F(Probe, WheneverTheProcessDiesNoScratchFileIsLeft) {
  probing.plugin = &kFakeGds;
  std::atomic<int> calls{0}, names{0};
  fake_gds().on_call = [&] {
    ++calls;
    if (!std::filesystem::is_empty(directory())) ++names;
  };
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "compat") << probe->reason;
  EXPECT_GE(calls, 1 + 1 + 3 * 4) << "make, open, and three passes over four pieces";
  EXPECT_EQ(names, 0);
}

TEST(ProbeResult, GdsIsUsedWhereItReadsMoreThanATenthFaster) {
  const auto uses = [](const char* mode, double gds_read) {
    return GdsProbe{.mode = mode, .reason = "", .gds_read = gds_read, .host_read = 10}.use_gds();
  };
  EXPECT_FALSE(uses("gds", 9));
  EXPECT_FALSE(uses("gds", 10.9)) << "within what one pass is off by";
  EXPECT_TRUE(uses("gds", 11.1));
  EXPECT_FALSE(uses("compat", 20));
  EXPECT_FALSE(uses("none", 20));
}

TEST_F(Probe, ADirectoryThatIsNotThere) {
  probing.directory += "/none";
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_FALSE(probe.ok());
  EXPECT_NE(probe.status().message().find(probing.directory), std::string::npos) << probe.status().to_string();
}

// ---- loading the plugin

std::string why_not(const std::string& path) {
  const Result<const LmcnGdsPlugin*> loaded = load_gds_plugin(path);
  EXPECT_FALSE(loaded.ok());
  if (loaded.ok()) return "";
  EXPECT_EQ(loaded.status().code(), Code::kUnavailable);
  return loaded.status().message();
}

TEST(Plugin, WhatIsMissingIsNamed) {
  EXPECT_NE(why_not("/nowhere/liblmcn_gds.so").find("/nowhere/liblmcn_gds.so"), std::string::npos);
  EXPECT_NE(why_not(LMCN_TEST_STUB).find("it is another library"), std::string::npos);
  EXPECT_NE(why_not(LMCN_TEST_OLD_PLUGIN).find("is of lmcache-native 0.0.1"), std::string::npos);
  const std::string missing[] = {"/nowhere/libkvikio.so"};
  const Result<const LmcnGdsPlugin*> loaded = load_gds_plugin(LMCN_TEST_OLD_PLUGIN, missing);
  ASSERT_FALSE(loaded.ok());
  EXPECT_NE(loaded.status().message().find("/nowhere/libkvikio.so"), std::string::npos);
}

}  // namespace

const LmcnGdsPlugin* plugin_under_test() {
  return nullptr;
}
std::string name_under_test() {
  return "host";
}

}  // namespace lmcn::load_test
