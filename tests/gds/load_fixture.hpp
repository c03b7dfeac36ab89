// Records that a real log wrote, pages of a small model, and a loader between them. Each test executable says what reads the files.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/seq_points.hpp"
#include "copy/gds_plugin.h"
#include "lmcn/device_load.hpp"
#include "nvme/log_fixture.hpp"

namespace lmcn::load_test {

using namespace std::chrono_literals;
using nvme::kKiB;
using nvme::kMiB;

/// What reads the files in this executable; null: O_DIRECT alone. Defined by each.
const LmcnGdsPlugin* plugin_under_test();
/// What DeviceLoader::name() then says.
std::string name_under_test();
/// Where pages and staging lie, and pages there; defined by each.
int device_under_test();
std::byte* allocate_pages(std::size_t bytes);
void release_pages(std::byte* pages);

class LoadFixture : public nvme::LogFixture {
 protected:
  static constexpr std::int64_t kLayers = 4, kPlanes = 2, kBlockTokens = 8, kHeads = 2, kHeadDim = 64, kElementBytes = 2;
  static constexpr std::int64_t kChunkTokens = 64, kBlocks = 256, kTokenBytes = kHeads * kHeadDim * kElementBytes;
  static constexpr std::int64_t kBlocksOfChunk = kChunkTokens / kBlockTokens;

  LoadFixture() {
    options.limit_bytes = 24 * kMiB;
    options.region_bytes = 2 * kMiB;
    options.max_record_bytes = 768 * kKiB;
    loading.rank_count = 3;
    loading.rank = 1;
    loading.device = device_under_test();
    loading.plugin = plugin_under_test();
    loading.allow_compat = true;
    loading.buffer_bytes = 4 * kMiB;
    loading.in_flight = 4;
    expected.assign(kLayers * kBlocks * kPlanes * kBlockTokens * kTokenBytes, kUntouched);
    pages = allocate_pages(expected.size());
    forget_loads();
    for (std::int64_t l = 0; l < kLayers; ++l) {
      PagedLayer layer{pages + l * kBlocks * kPlanes * kBlockTokens * kTokenBytes, {}};
      for (std::int64_t p = 0; p < kPlanes; ++p) {
        layer.planes.push_back({.offset = p * kBlockTokens * kTokenBytes,
                                .block = kPlanes * kBlockTokens * kTokenBytes,
                                .token = kTokenBytes,
                                .head = kHeadDim * kElementBytes,
                                .dim = kElementBytes});
      }
      layout.layers.push_back(layer);
    }
    layout.num_blocks = kBlocks;
    layout.block_tokens = kBlockTokens;
    layout.heads = kHeads;
    layout.head_dim = kHeadDim;
    layout.element_bytes = kElementBytes;
    slot = SlotLayout::make(layout, kChunkTokens).value();
    open();
  }

  ~LoadFixture() override {
    loader.reset();
    release_pages(pages);
  }

  void forget_loads() {
    expected.assign(expected.size(), kUntouched);
    std::copy(expected.begin(), expected.end(), pages);
  }

  void make_loader() {
    auto made = make_device_loader(layout, slot, loading);
    ASSERT_TRUE(made.ok()) << made.status().to_string();
    loader = std::move(made).value();
  }

  std::uint64_t payload_bytes() const { return static_cast<std::uint64_t>(slot.rank_bytes) * loading.rank_count; }

  /// Writes chunk `id` to the log; its payload follows from `id`.
  DeviceLoadItem write(std::uint32_t id) { return write(id, payload_bytes()); }
  DeviceLoadItem write(std::uint32_t id, std::uint64_t bytes) {
    ids = std::max(ids, id + 1);
    nvme::PageBuffer image(image_bytes(bytes) / kPageBytes);
    begin_slot(image.data(), nvme::key_of(id), nvme::kTestNamespace, bytes, loading.rank_count, 1);
    nvme::fill_payload(image.data() + kPageBytes, bytes, id);
    Extent extent;
    for (int attempt = 0; attempt < 2; ++attempt) {
      std::promise<Put> done;
      const Status begun =
          log->append(image.data(), image.bytes(), id, [&](const Status& status, Extent at) { done.set_value({status, at}); });
      if (begun.code() == Code::kResourceExhausted) {  // the next region is being prepared
        idle();
        EXPECT_TRUE(log->maintain().ok());
        idle();
        continue;
      }
      EXPECT_TRUE(begun.ok()) << begun.to_string();
      const Put put = done.get_future().get();
      EXPECT_TRUE(put.status.ok()) << put.status.to_string();
      extent = put.extent;
      break;
    }
    DeviceLoadItem item;
    item.path = file("data.000").string();
    item.offset = extent.region * options.region_bytes + extent.page * kPageBytes;
    item.image_bytes = extent.pages * kPageBytes;
    item.key = nvme::key_of(id);
    item.ns = nvme::kTestNamespace;
    item.region_sequence = slot_header(image.data())->region_sequence;
    item.tokens = kChunkTokens;
    return item;
  }

  /// Adds an item whose tokens go to blocks of its own.
  void add(DeviceLoadJob& job, DeviceLoadItem item) {
    item.block_begin = static_cast<std::uint32_t>(job.block_ids.size());
    for (std::int64_t b = 0; b < kBlocksOfChunk; ++b) job.block_ids.push_back(next_block = (next_block + 37) % kBlocks);
    job.items.push_back(std::move(item));
  }

  /// What pages hold once item `index` of `job` is loaded as chunk `id`.
  void expect_loaded(const DeviceLoadJob& job, std::size_t index, std::uint32_t id) {
    std::vector<std::byte> payload(payload_bytes());
    nvme::fill_payload(payload.data(), payload.size(), id);
    const std::byte* const part = payload.data() + slot.rank_bytes * loading.rank;
    const DeviceLoadItem& item = job.items[index];
    for (std::int64_t l = 0; l < kLayers; ++l)
      for (std::int64_t p = 0; p < kPlanes; ++p)
        for (std::int64_t t = 0; t < item.tokens; ++t) {
          const std::int64_t at = item.token_in_block + t;
          const std::int64_t block = job.block_ids[item.block_begin + static_cast<std::size_t>(at / kBlockTokens)];
          std::byte* const to =
              expected.data() + (((l * kBlocks + block) * kPlanes + p) * kBlockTokens + at % kBlockTokens) * kTokenBytes;
          std::memcpy(
              to,
              part + slot.layer_offset[static_cast<std::size_t>(l)] + p * slot.plane_bytes + (item.first_token + t) * kTokenBytes,
              kTokenBytes);
        }
  }
  /// Every byte of all pages, those nothing was loaded into too.
  void expect_pages() { EXPECT_TRUE(std::equal(expected.begin(), expected.end(), pages)) << "pages differ from what was loaded"; }

  DeviceLoadDone result(std::uint64_t id) {
    const std::uint64_t waited[] = {id};
    EXPECT_EQ(loader->wait(waited, 60s).to_string(), "ok");
    std::vector<DeviceLoadDone> done = loader->poll();
    EXPECT_EQ(done.size(), 1u);
    if (done.empty()) return {};
    EXPECT_EQ(done[0].id, id);
    return done[0];
  }
  DeviceLoadDone load(const DeviceLoadJob& job) {
    const Status submitted = loader->submit(job);
    EXPECT_TRUE(submitted.ok()) << submitted.to_string();
    return submitted.ok() ? result(job.id) : DeviceLoadDone{};
  }
  /// The one item that failed, and how.
  static void expect_failed(const DeviceLoadDone& done, std::uint32_t item, Code code, const std::string& words) {
    EXPECT_FALSE(done.ok);
    ASSERT_EQ(done.failed.size(), 1u);
    EXPECT_EQ(done.failed[0].item, item);
    EXPECT_EQ(code_name(done.failed[0].status.code()), std::string(code_name(code))) << done.failed[0].status.to_string();
    EXPECT_NE(done.failed[0].status.message().find(words), std::string::npos) << done.failed[0].status.to_string();
  }

  static constexpr std::byte kUntouched{0xA5};
  DeviceLoaderOptions loading;
  PagedKvLayout layout;
  SlotLayout slot;
  std::byte* pages = nullptr;
  std::vector<std::byte> expected;
  std::int64_t next_block = 0;
  std::unique_ptr<DeviceLoader> loader;
};

}  // namespace lmcn::load_test
