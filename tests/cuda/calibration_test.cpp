// Which path is chosen, by figures that the fake runtime is told, and what is kept of it.
#include "calibration.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "base/seq_points.hpp"
#include "calibration_cache.hpp"
#include "cuda_fixture.hpp"
#include "measurement.hpp"
#include "per_process.hpp"

namespace lmcn::copier_suite {
namespace {

namespace fs = std::filesystem;

/// A cache folder of its own; before the copier is made.
class CacheFolder {
 public:
  CacheFolder() {
    path_ = (fs::temp_directory_path() / "lmcn-calibration-XXXXXX").string();
    if (::mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp " + path_);
    ::setenv("XDG_CACHE_HOME", path_.c_str(), 1);
  }
  ~CacheFolder() {
    ::unsetenv("XDG_CACHE_HOME");
    fs::remove_all(path_);
  }
  CacheFolder(const CacheFolder&) = delete;
  CacheFolder& operator=(const CacheFolder&) = delete;
  fs::path folder() const { return fs::path(path_) / "lmcache-native" / "calibration"; }
  std::vector<fs::path> files() const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(folder())) found.push_back(entry.path());
    return found;
  }

 private:
  std::string path_;
};

class CudaCalibration : public CacheFolder, public CudaFixture {
 protected:
  CudaCalibration() : CudaFixture("memcpy") { ::setenv("LMCN_COPY_PATH", "auto", 1); }

  /// The fake's time: each call of `fast` takes 1 us, of the others 100.
  void make_fast(const std::string& fast) {
    for (const char* call : {"cudaMemcpyAsync", "cudaMemcpy2DAsync", "cuMemcpyBatchAsync", "kernel"}) {
      fake_cuda::set_cost(call, call == fast ? 1 : 100);
    }
  }
  std::unique_ptr<PagedCopier> make() {
    auto made = backend_->make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options);
    EXPECT_TRUE(made.ok()) << made.status().to_string();
    return made.ok() ? std::move(made).value() : nullptr;
  }
  CalibrationKey key() {
    CalibrationKey key;
    std::thread([&] {
      const auto geometry = CopyGeometry::make(paged_->layout(), slot_, arena_->base(), arena_->bytes(), 1);
      key = CalibrationKey::of(*geometry, slot_.chunk_tokens, kDevice).value();
    }).join();
    return key;
  }
  static std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }
};

TEST_F(CudaCalibration, TakesTheFastestAndSaysTheFigures) {
  const std::map<std::string, std::string> path_of_call = {{"cuMemcpyBatchAsync", "batch"}, {"kernel", "kernel"}};
  for (const auto& [call, path] : path_of_call) {
    fs::remove_all(folder());
    fake_cuda::reset();
    make_fast(call);
    const auto copier = make();
    EXPECT_EQ(copier->name(), "cuda-" + path);
    const std::string details = copier->details();
    EXPECT_EQ(details.find("stores by " + path + " (GB/s: batch "), 0u) << details;
    for (const char* other : {"memcpy ", "staged ", "kernel ", "loads by "})
      EXPECT_NE(details.find(other), std::string::npos) << details;
  }
}

TEST_F(CudaCalibration, AmongEquallyFastOnesTheOneThatLeavesTheDeviceToTheModel) {
  Calibration calibration;
  calibration.rates = {
      {PathKind::kMemcpy, 10, 10}, {PathKind::kBatch, 24, 18}, {PathKind::kStaged, 24.5, 19.5}, {PathKind::kKernel, 25, 20}};
  EXPECT_EQ(fastest(calibration, CopyDirection::kGather), PathKind::kBatch);
  EXPECT_EQ(fastest(calibration, CopyDirection::kScatter), PathKind::kStaged);
  EXPECT_EQ(fastest({}, CopyDirection::kGather), std::nullopt);
}

TEST_F(CudaCalibration, TouchesNeitherPagesNorSlotsAndLeavesNothingBehind) {
  arena_->expect_unchanged();
  copier_.reset();
  const fake_cuda::State before = fake_cuda::state();
  fake_cuda::reset();
  make().reset();
  EXPECT_GE(fake_cuda::calls("cudaEventElapsedTime"), 8);
  EXPECT_EQ(paged_->compare(), "");
  EXPECT_EQ(arena_->compare(), "");
  const fake_cuda::State after = fake_cuda::state();
  EXPECT_EQ(after.live_streams, before.live_streams);
  EXPECT_EQ(after.live_events, before.live_events);
  EXPECT_EQ(after.live_device_blocks, before.live_device_blocks);
  EXPECT_EQ(after.live_host_blocks, before.live_host_blocks);
  EXPECT_EQ(after.live_registrations, before.live_registrations);
}

// The scratch layouts keep strides of real ones; a copy that leaves its scratch memory is an error of the fake.
TEST_F(CudaCalibration, MeasuresEveryLayout) {
  for (const Case& c : all_cases()) {
    if (c.block_tokens != 16 && c.order != Order::kOpaque && c.order != Order::kOpaqueInBlock) continue;
    PagedModel paged(*backend_, c, 64);
    const SlotLayout slot = SlotLayout::make(paged.layout(), c.chunk_tokens).value();
    fake_cuda::set_cost("kernel", 1);
    ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);
    const Calibration measured = measure_paths(paged.layout(), slot, kDevice, kAllPaths, {});
    ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
    EXPECT_EQ(measured.notes, std::vector<std::string>()) << c.name();
    EXPECT_EQ(measured.rates.size(), kAllPaths.size()) << c.name();
    EXPECT_EQ(fake_cuda::fault(), "");
    backend_->release_all();
  }
}

TEST_F(CudaCalibration, TheFirstUseOfAPathIsNotCounted) {
  make_fast("kernel");
  for (const char* call : {"cudaMemcpyAsync", "cudaMemcpy2DAsync", "cuMemcpyBatchAsync", "kernel"})
    fake_cuda::set_first_cost(call, 1e6);
  ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);
  const Calibration measured = measure_paths(paged_->layout(), slot_, kDevice, kAllPaths, {});
  ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
  EXPECT_EQ(measured.notes, std::vector<std::string>());
  EXPECT_EQ(fastest(measured, CopyDirection::kGather), PathKind::kKernel);
  EXPECT_EQ(fastest(measured, CopyDirection::kScatter), PathKind::kKernel);
}

// Short of memory today is no reason to leave a path out for ever.
TEST_F(CudaCalibration, WithACandidateThatFailedNothingIsKept) {
  make_fast("kernel");
  fake_cuda::fail("cudaLaunchKernelExC", 2, cudaErrorMemoryAllocation);
  const auto copier = make();
  EXPECT_NE(copier->details().find(": out of memory (2)"), std::string::npos) << copier->details();
  EXPECT_TRUE(files().empty());
  fake_cuda::reset();
  make_fast("kernel");
  EXPECT_EQ(make()->name(), "cuda-kernel");
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(CudaCalibration, LongRunsNeedNoKernel) {
  const auto candidates = [](std::int64_t page_bytes) {
    std::byte* const anywhere = reinterpret_cast<std::byte*>(1 << 20);
    const PagedKvLayout paged = PagedKvLayout::opaque({anywhere}, 4, page_bytes, page_bytes);
    const SlotLayout slot = SlotLayout::make(paged, 2).value();
    return candidates_of(CopyGeometry::make(paged, slot, anywhere, 1 << 30, 0).value());
  };
  EXPECT_EQ(candidates(256 << 10), (std::vector{PathKind::kBatch, PathKind::kMemcpy}));
  EXPECT_EQ(candidates((256 << 10) - 1).size(), 4u);
}

TEST_F(CudaCalibration, WhatFailsIsANoteAndTheOthersAreMeasured) {
  make_fast("cuMemcpyBatchAsync");
  fake_cuda::set_driver(12070);
  const auto without_batch = make();
  EXPECT_EQ(without_batch->name().find("batch"), std::string::npos);
  EXPECT_NE(without_batch->details().find("; batch: cudaGetDriverEntryPointByVersion: invalid argument (1)"), std::string::npos)
      << without_batch->details();
  EXPECT_TRUE(files().empty()) << "measured in part";
  fs::remove_all(folder());
  fake_cuda::reset();
  fake_cuda::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
  const auto nothing = make();
  EXPECT_EQ(nothing->name(), "cuda-memcpy");
  EXPECT_NE(nothing->details().find("; nothing measured: cudaMalloc: out of memory (2)"), std::string::npos) << nothing->details();
  EXPECT_TRUE(files().empty()) << "a failure is not remembered";
}

TEST_F(CudaCalibration, IsKeptPrivateAndUsedAgain) {
  make_fast("kernel");
  EXPECT_EQ(make()->name(), "cuda-kernel");
  ASSERT_EQ(files().size(), 1u);
  struct stat status{};
  ASSERT_EQ(::stat(files()[0].c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
  ASSERT_EQ(::stat(folder().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  fake_cuda::reset();
  make_fast("cuMemcpyBatchAsync");
  const auto again = make();
  EXPECT_EQ(again->name(), "cuda-kernel") << "what was measured earlier";
  EXPECT_NE(again->details().find("; measured earlier: " + files()[0].string()), std::string::npos) << again->details();
  EXPECT_EQ(fake_cuda::calls("cudaEventElapsedTime"), 0);
}

// An engine registers its memory, then serves: it waits no longer than it said, and its first jobs need not wait at all.
TEST_F(CudaCalibration, JobsAreCopiedWhileItIsMeasured) {
  make_fast("kernel");
  copier_.reset();
  Measurement::forget_all();
  SeqPointScope scope;
  SeqPoints::hold("measurement.begin");
  const auto prepare = [&](std::chrono::milliseconds wait) { return prepare_cuda_copier(paged_->layout(), slot_, kDevice, wait); };
  EXPECT_FALSE(prepare(1ms).value());
  copier_ = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice).value();
  EXPECT_EQ(copier_->name(), "cuda-memcpy");
  EXPECT_EQ(copier_->details().find("memcpy until the paths are measured; arena "), 0u) << copier_->details();
  const auto copies = [&](std::uint64_t id) {
    begin_slots();
    ASSERT_TRUE(copier_->submit(job(id, CopyDirection::kGather, {0, 1})).ok());
    EXPECT_EQ(only_result(id).message, "");
    for (const std::size_t s : {0, 1}) expect_gathered(s);
    EXPECT_EQ(arena_->compare(), "");
    ASSERT_TRUE(copier_->submit(layered_job(id, {2, 3})).ok());
    EXPECT_EQ(only_result(id).message, "");
    for (const std::size_t s : {2, 3})
      for (const std::int64_t layer : {0, 1}) expect_loaded(s, layer);
    EXPECT_EQ(paged_->compare(), "");
  };
  copies(1);
  EXPECT_EQ(fake_cuda::calls("cudaLaunchKernelExC"), 0);
  SeqPoints::release("measurement.begin");
  EXPECT_TRUE(prepare(60s).value());
  EXPECT_EQ(copier_->name(), "cuda-memcpy") << "paths change between jobs";
  paged_->fill(std::byte{1});
  paged_->upload();
  const int launches = fake_cuda::calls("cudaLaunchKernelExC");
  copies(2);
  EXPECT_EQ(copier_->name(), "cuda-kernel");
  EXPECT_EQ(copier_->details().find("stores by kernel (GB/s: batch "), 0u) << copier_->details();
  EXPECT_GT(fake_cuda::calls("cudaLaunchKernelExC"), launches);
}

TEST_F(CudaCalibration, ACopierThatWasNotPreparedBeginsItAndWaitsForNothing) {
  make_fast("cuMemcpyBatchAsync");
  copier_.reset();
  Measurement::forget_all();
  SeqPointScope scope;
  SeqPoints::hold("measurement.begin");
  copier_ = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice).value();
  ASSERT_TRUE(SeqPoints::wait_until_reached("measurement.begin", 60s));
  EXPECT_EQ(copier_->name(), "cuda-memcpy");
  SeqPoints::release("measurement.begin");
  EXPECT_TRUE(prepare_cuda_copier(paged_->layout(), slot_, kDevice, 60s).value());
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_TRUE(only_result(1).ok);
  EXPECT_EQ(copier_->name(), "cuda-batch+memcpy") << "no load came yet";
  const std::string details = copier_->details();
  EXPECT_EQ(details.find("stores by batch (GB/s: "), 0u) << details;
  EXPECT_NE(details.find("); memcpy until the paths are measured; arena "), std::string::npos) << details;
}

TEST_F(CudaCalibration, AProcessMeasuresALayoutOnce) {
  make_fast("kernel");
  EXPECT_EQ(make()->name(), "cuda-kernel");
  fs::remove_all(folder());
  fake_cuda::reset();
  make_fast("cuMemcpyBatchAsync");
  const auto again = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice);
  EXPECT_EQ((*again)->name(), "cuda-kernel");
  EXPECT_EQ(fake_cuda::calls("cudaEventElapsedTime"), 0);
}

TEST_F(CudaCalibration, WhatWasMeasuredButCannotBeMadeLaterIsANote) {
  make_fast("kernel");
  copier_.reset();
  Measurement::forget_all();
  SeqPointScope scope;
  SeqPoints::hold("measurement.begin");
  copier_ = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice).value();
  SeqPoints::release("measurement.begin");
  EXPECT_TRUE(prepare_cuda_copier(paged_->layout(), slot_, kDevice, 60s).value());
  fake_cuda::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);  // the table of planes
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_EQ(only_result(1).message, "");
  EXPECT_EQ(copier_->name(), "cuda-memcpy");
  // Not even that: it goes on with what it has.
  fake_cuda::fail_all("cudaMalloc", cudaErrorMemoryAllocation);
  fake_cuda::fail_all("cudaDeviceGetAttribute", cudaErrorMemoryAllocation);
  ASSERT_TRUE(copier_->submit(job(2, CopyDirection::kScatter, {1})).ok());
  EXPECT_EQ(only_result(2).message, "");
  for (const std::int64_t layer : {0, 1}) expect_loaded(1, layer);
  EXPECT_EQ(paged_->compare(), "");
  const std::string details = copier_->details();
  EXPECT_EQ(details.find("stores by memcpy (GB/s: "), 0u) << details;
  EXPECT_NE(details.find("; loads by memcpy; kernel: cudaMalloc: out of memory (2)"), std::string::npos) << details;
  EXPECT_NE(details.find("; memcpy: cudaDeviceGetAttribute: out of memory (2); arena "), std::string::npos) << details;
}

TEST_F(CudaCalibration, CopiesThatDoNotEndAreNotWaitedForForEverAndKeepTheirMemory) {
  const fake_cuda::State before = fake_cuda::state();
  fake_cuda::fail_all("cudaEventQuery", cudaErrorNotReady);
  ASSERT_TRUE(cudaSetDevice(kDevice) == cudaSuccess);
  const Calibration measured = measure_paths(paged_->layout(), slot_, kDevice, kAllPaths, {.turn = 1ms});
  EXPECT_TRUE(measured.rates.empty());
  ASSERT_EQ(measured.notes.size(), 1u);
  EXPECT_EQ(measured.notes[0].find("nothing measured: "), 0u) << measured.notes[0];
  EXPECT_NE(measured.notes[0].find(": copies have not ended within 1 ms"), std::string::npos) << measured.notes[0];
  EXPECT_GT(fake_cuda::state().live_device_blocks, before.live_device_blocks) << "memory of copies that may still run";
  fake_cuda::reset();
  release_kept();
  EXPECT_EQ(fake_cuda::state().live_device_blocks, before.live_device_blocks);
  EXPECT_EQ(fake_cuda::state().live_host_blocks, before.live_host_blocks);
  ASSERT_TRUE(cudaSetDevice(0) == cudaSuccess);
}

// As at exit, where CUDA is about to be unloaded.
TEST_F(CudaCalibration, WhatIsUnderWayIsStoppedAndAsksNothingMoreOfCuda) {
  copier_.reset();
  Measurement::forget_all();
  fake_cuda::fail_all("cudaEventQuery", cudaErrorNotReady);
  const auto prepare = [&](std::chrono::milliseconds wait) { return prepare_cuda_copier(paged_->layout(), slot_, kDevice, wait); };
  EXPECT_FALSE(prepare(0ms).value());
  const auto until = std::chrono::steady_clock::now() + 60s;
  while (fake_cuda::calls("cudaEventQuery") == 0 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  const int freed = fake_cuda::calls("cudaFree");
  EXPECT_TRUE(Measurement::stop_all(60s));
  EXPECT_EQ(fake_cuda::calls("cudaFree"), freed);
  EXPECT_TRUE(prepare(0ms).value()) << "it has ended";
  EXPECT_TRUE(files().empty());
  fake_cuda::reset();
  copier_ = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice).value();
  EXPECT_EQ(copier_->name(), "cuda-memcpy");
  EXPECT_NE(copier_->details().find(": the process ends"), std::string::npos) << copier_->details();
  copier_.reset();
  Measurement::forget_all();
  std::thread([] {
    EXPECT_EQ(cudaSetDevice(kDevice), cudaSuccess);
    release_kept();
  }).join();
}

TEST_F(CudaCalibration, PreparingSaysWhatIsWrong) {
  const auto prepare = [&](int device) { return prepare_cuda_copier(paged_->layout(), slot_, device, 60s).status().to_string(); };
  EXPECT_EQ(prepare(7), "invalid_argument: device is 7, must be in 0..1");
  fake_cuda::set_devices(0);
  EXPECT_EQ(prepare(0), "unavailable: no CUDA device");
  fake_cuda::reset();
  fake_cuda::fail("cudaSetDevice", 1, cudaErrorMemoryAllocation);
  EXPECT_EQ(prepare(kDevice), "unavailable: cudaSetDevice: out of memory (2)");
  SlotLayout other = slot_;
  other.rank_bytes = 0;
  EXPECT_EQ(prepare_cuda_copier(paged_->layout(), other, kDevice, 60s).status().to_string(), "invalid_argument: rank_bytes is 0");
  other.rank_bytes += slot_.rank_bytes + 4096;
  EXPECT_EQ(prepare_cuda_copier(paged_->layout(), other, kDevice, 60s).status().code(), Code::kInvalidArgument);
  // Where the path is given there is nothing to do.
  fake_cuda::reset();
  ::setenv("LMCN_COPY_PATH", "kernel", 1);
  EXPECT_TRUE(prepare_cuda_copier(paged_->layout(), slot_, kDevice, 0ms).value());
  EXPECT_EQ(fake_cuda::calls("cudaGetDeviceCount"), 0);
  ::setenv("LMCN_COPY_PATH", "fast", 1);
  EXPECT_EQ(prepare(kDevice), "invalid_argument: LMCN_COPY_PATH is \"fast\", must be auto, memcpy, batch, kernel or staged");
  ::setenv("LMCN_COPY_PATH", "auto", 1);
  // A thread of its own that cannot begin.
  Measurement::forget_all();
  fake_cuda::fail("cudaSetDevice", 2, cudaErrorMemoryAllocation);
  EXPECT_EQ(prepare(kDevice), "ok");
  const auto made = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice);
  EXPECT_NE((*made)->details().find("; nothing measured: cudaSetDevice: out of memory (2)"), std::string::npos)
      << (*made)->details();
  for (const char* call : {"cudaGetDeviceProperties", "cudaDriverGetVersion"}) {
    Measurement::forget_all();
    fake_cuda::fail(call, 1, cudaErrorInvalidValue);
    EXPECT_EQ(prepare(kDevice), "ok");
    const auto unnamed = make_cuda_copier(paged_->layout(), slot_, arena_->base(), arena_->bytes(), case_.options, kDevice);
    EXPECT_NE((*unnamed)->details().find(std::string("; not kept: ") + call + ": invalid argument (1)"), std::string::npos)
        << (*unnamed)->details();
  }
}

TEST_F(CudaCalibration, EachDirectionHasItsOwn) {
  Calibration known;
  known.rates = {{PathKind::kBatch, 20, 5}, {PathKind::kMemcpy, 1, 1}, {PathKind::kStaged, 3, 6}, {PathKind::kKernel, 4, 22}};
  ASSERT_TRUE(CalibrationCache::open()->store(key(), known).ok());
  const auto copier = make();
  EXPECT_EQ(copier->name(), "cuda-batch+kernel");
  EXPECT_EQ(copier->details().find("stores by batch (GB/s: batch 20.0, memcpy 1.0, staged 3.0, kernel 4.0); loads by kernel (GB/s: "
                                   "batch 5.0, memcpy 1.0, staged 6.0, kernel 22.0); measured earlier: "),
            0u)
      << copier->details();
  copier_ = make();
  ASSERT_TRUE(copier_->submit(job(1, CopyDirection::kGather, {0})).ok());
  EXPECT_EQ(only_result(1).message, "");
  expect_gathered(0);
  EXPECT_EQ(arena_->compare(), "");
}

TEST_F(CudaCalibration, StagingMemoryIsBounded) {
  constexpr std::int64_t kPage = 32 << 20;
  for (const std::int64_t blocks_in_chunk : {2, 3}) {
    std::byte* const pages = fake_cuda::allocate(4 * kPage, kDevice);
    const PagedKvLayout paged = PagedKvLayout::opaque({pages}, 4, kPage, kPage);
    const SlotLayout slot = SlotLayout::make(paged, blocks_in_chunk).value();
    const std::uint64_t arena_bytes = image_bytes(static_cast<std::uint64_t>(slot.rank_bytes));
    std::byte* const arena = fake_cuda::allocate_host(arena_bytes);
    Calibration known;
    known.rates = {{PathKind::kMemcpy, 1, 1}, {PathKind::kStaged, 9, 9}};
    CalibrationKey key;
    std::thread([&] {
      key = CalibrationKey::of(CopyGeometry::make(paged, slot, arena, arena_bytes, 0).value(), slot.chunk_tokens, kDevice).value();
    }).join();
    ASSERT_TRUE(CalibrationCache::open()->store(key, known).ok());
    auto made = make_cuda_copier(paged, slot, arena, arena_bytes, {}, kDevice);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    EXPECT_EQ((*made)->name(), blocks_in_chunk == 2 ? "cuda-staged" : "cuda-memcpy");
    const std::string why = "; staged: a rank's part of a slot is 100663296 bytes, staging memory is at most 67108864";
    EXPECT_EQ((*made)->details().find(why) != std::string::npos, blocks_in_chunk == 3) << (*made)->details();
    made->reset();
    ::setenv("LMCN_COPY_PATH", "staged", 1);
    EXPECT_EQ(make_cuda_copier(paged, slot, arena, arena_bytes, {}, kDevice).status().code(),
              blocks_in_chunk == 2 ? Code::kOk : Code::kResourceExhausted);
    ::setenv("LMCN_COPY_PATH", "auto", 1);
    fake_cuda::release_host(arena);
    fake_cuda::release(pages);
  }
}

// Anything but exactly what was written for this key is as good as absent.
TEST_F(CudaCalibration, BadContentIsMadeAnew) {
  make_fast("kernel");
  make().reset();
  const fs::path file = files().at(0);
  const std::string good = read(file);
  const Result<CalibrationCache> cache = CalibrationCache::open();
  ASSERT_TRUE(cache.ok());
  ASSERT_TRUE(cache->load(key()));
  int tried = 0;
  const auto expect_ignored = [&](const std::string& text) {
    write(file, text);
    EXPECT_FALSE(cache->load(key())) << text;
    ++tried;
  };
  for (std::size_t bytes = 0; bytes < good.size(); ++bytes) expect_ignored(good.substr(0, bytes));
  for (std::size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    expect_ignored(bad);
  }
  for (const char* more : {"\n", " ", "gb_s kernel 1 1\n"}) expect_ignored(good + more);
  expect_ignored(std::string(1 << 20, 'x'));
  EXPECT_GE(tried, 400);
  fake_cuda::reset();
  make_fast("cuMemcpyBatchAsync");
  EXPECT_EQ(make()->name(), "cuda-batch");
  EXPECT_TRUE(cache->load(key()));
}

TEST_F(CudaCalibration, AForeignFileIsIgnored) {
  make_fast("kernel");
  make().reset();
  const fs::path file = files().at(0);
  const Result<CalibrationCache> cache = CalibrationCache::open();
  CalibrationKey other = key();
  other.text.insert(other.text.find("device ") + 7, "another ");
  ASSERT_NE(cache->path_of(other), file.string());
  Calibration known;
  known.rates = {{PathKind::kMemcpy, 9, 9}};
  ASSERT_TRUE(cache->store(other, known).ok());
  EXPECT_TRUE(cache->load(other));
  fs::copy_file(cache->path_of(other), file, fs::copy_options::overwrite_existing);
  EXPECT_FALSE(cache->load(key())) << "right in itself, but another device's";
  // A link may lead anywhere.
  fs::remove(file);
  fs::create_symlink(cache->path_of(other), file);
  EXPECT_FALSE(cache->load(key()));
}

TEST_F(CudaCalibration, AFolderThatOthersMayWriteIsNotUsed) {
  ASSERT_TRUE(CalibrationCache::open().ok());
  ::chmod(folder().c_str(), 0777);
  EXPECT_EQ(CalibrationCache::open().status().code(), Code::kUnavailable);
  const auto copier = make();
  EXPECT_NE(copier->details().find("; not kept: " + folder().string()), std::string::npos) << copier->details();
  EXPECT_TRUE(files().empty());
  ::setenv("XDG_CACHE_HOME", "relative", 1);
  ::setenv("HOME", "", 1);
  EXPECT_EQ(CalibrationCache::open().status().to_string(), "unavailable: neither XDG_CACHE_HOME nor HOME is an absolute path");
}

TEST_F(CudaCalibration, WhatCannotBeWrittenIsANote) {
  ASSERT_TRUE(CalibrationCache::open().ok());
  fs::create_directory(CalibrationCache::open()->path_of(key()));  // rename() onto a folder fails
  make_fast("kernel");
  const auto copier = make();
  EXPECT_EQ(copier->name(), "cuda-kernel");
  EXPECT_NE(copier->details().find("; not kept: writing "), std::string::npos) << copier->details();
  EXPECT_EQ(files().size(), 1u) << "no temporary file is left";
}

}  // namespace
}  // namespace lmcn::copier_suite
