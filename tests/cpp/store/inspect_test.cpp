// lmcn/inspect.hpp over directories that real stores left behind.
#include "lmcn/inspect.hpp"

#include <fstream>

#include "nvme/format.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Inspect : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    with_nvme(32 << 20);
    open();
  }
  void close() {
    const Status closed = store->close(10s);
    ASSERT_TRUE(closed.ok()) << closed.to_string();
    store.reset();
  }
  std::string path() const { return options.directories[0]; }
  StoreReport report(bool namespaces = false) {
    auto found = inspect_store(path(), namespaces);
    EXPECT_TRUE(found.ok()) << found.status().to_string();
    return found.ok() ? *found : StoreReport{};
  }
  void put_in(const NamespaceId& other, int i) {
    const ChunkKey key = KeyDeriver(other).derive(std::as_bytes(std::span(&i, 1)));
    auto lease = store->reserve(other, std::span(&key, 1), kPayload, false);
    ASSERT_TRUE(lease.ok());
    fill(lease->payload(0), kPayload, i);
    lease->mark_filled(0);
    ASSERT_EQ(lease->commit(), 1u);
  }
  std::map<std::string, std::string> contents() const {
    std::map<std::string, std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(path())) {
      std::ifstream in(entry.path(), std::ios::binary);
      all[entry.path().filename()] = {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    }
    return all;
  }
};

TEST_F(Inspect, TellsWhatThereIs) {
  put_all(0, 100);
  flush();
  for (int n = 0; n < 5; ++n) EXPECT_EQ(get(7), "hit");
  EXPECT_EQ(get(8), "hit");
  put_in(make_namespace("other"), 1);
  close();
  const auto before = contents();
  const StoreReport found = report(true);
  EXPECT_EQ(contents(), before) << "nothing was written";
  EXPECT_EQ(found.records, 101u);
  EXPECT_EQ(found.record_bytes, 101 * (kPayload + kPageBytes));
  EXPECT_EQ(found.from_checkpoint, 101u);
  EXPECT_EQ(found.hits, (std::vector<std::uint64_t>{99, 1, 0, 0, 1, 0, 0}));
  ASSERT_EQ(found.namespaces.size(), 2u);
  EXPECT_EQ(found.namespaces[0].ns, ns);
  EXPECT_EQ(found.namespaces[0].records, 100u);
  EXPECT_EQ(found.namespaces[1].records, 1u);
  EXPECT_EQ(found.stored_bytes, found.record_bytes);
  EXPECT_EQ(found.write_amplification(), 1.0);
  EXPECT_GT(found.day_bytes, found.record_bytes);
  EXPECT_LE(found.allocated_bytes, options.nvme_bytes);
  EXPECT_EQ(found.regions[0].state, "sealed");
  EXPECT_EQ(found.regions[0].records, 63u);
  EXPECT_EQ(found.regions[1].state, "open");
  EXPECT_EQ(found.regions[1].records, 38u);
  const std::int64_t now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  EXPECT_NEAR(static_cast<double>(found.regions[1].prepared_unix_s), static_cast<double>(now), 300);
  open();
  {
    std::lock_guard lock(store->mu);
    EXPECT_EQ(store->index.entry(store->index.find(key(7))).hits, 5u) << "hits outlive a restart";
  }
}

TEST_F(Inspect, RefusesWhatItMustNotTouch) {
  put_all(0, 3);
  flush();
  for (const Status& status :
       {inspect_store(path()).status(), verify_store(path(), nullptr).status(), clear_store(path()).status()}) {
    EXPECT_EQ(status.code(), Code::kLocked);
    EXPECT_NE(status.message().find(std::to_string(::getpid())), std::string::npos) << status.message();
  }
  close();
  EXPECT_EQ(inspect_store((root / "none").string()).status().code(), Code::kNotFound);
  std::filesystem::create_directory(root / "empty");
  std::filesystem::permissions(root / "empty", std::filesystem::perms::owner_all);
  EXPECT_EQ(inspect_store((root / "empty").string()).status().code(), Code::kNotFound);
  EXPECT_TRUE(std::filesystem::is_empty(root / "empty"));
  std::filesystem::create_directory_symlink(path(), root / "link");
  EXPECT_EQ(inspect_store((root / "link").string()).status().code(), Code::kInvalidArgument);
  EXPECT_EQ(report().records, 3u);
}

TEST_F(Inspect, VerifyNamesWhatIsBad) {
  put_all(0, 80);
  flush();
  Extent extent;
  {
    std::lock_guard lock(store->mu);
    extent = store->index.entry(store->index.find(key(70))).extent;
  }
  close();
  std::vector<std::uint64_t> seen;
  auto good = verify_store(path(), [&](std::uint64_t bytes, std::uint64_t of) {
    EXPECT_EQ(of, 80 * (kPayload + kPageBytes));
    seen.push_back(bytes);
    return true;
  });
  ASSERT_TRUE(good.ok());
  EXPECT_EQ(good->records, 80u);
  EXPECT_TRUE(good->bad.empty());
  EXPECT_EQ(seen.back(), good->bytes);
  {
    std::fstream file(root / "nvme" / "data.000", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(extent.region * options.region_bytes + extent.page * kPageBytes + kPageBytes + 5));
    file.put('!');
  }
  auto bad = verify_store(path(), nullptr, 3);
  ASSERT_TRUE(bad.ok());
  ASSERT_EQ(bad->bad.size(), 1u);
  EXPECT_EQ(bad->bad[0].key, key(70));
  EXPECT_EQ(bad->bad[0].page, extent.page);
  EXPECT_NE(bad->bad[0].why.find("segment 0"), std::string::npos) << bad->bad[0].why;
  auto stopped = verify_store(path(), [](std::uint64_t, std::uint64_t) { return false; });
  ASSERT_TRUE(stopped.ok());
  EXPECT_TRUE(stopped->stopped);
  EXPECT_EQ(stopped->records, 8u);
}

TEST_F(Inspect, ClearGivesEverythingBack) {
  put_all(0, 100);
  close();
  const auto cleared = clear_store(path());
  ASSERT_TRUE(cleared.ok()) << cleared.status().to_string();
  EXPECT_EQ(cleared->records, 100u);
  EXPECT_LT(report().allocated_bytes, 64u << 10);
  EXPECT_EQ(report().records, 0u);
  open();
  EXPECT_EQ(store->stats().recovered_chunks, 0u);
  put_all(0, 10);
  reopen();
  EXPECT_EQ(get(3), "hit");
}

class InspectClear : public Inspect, public testing::WithParamInterface<bool> {};

TEST_P(InspectClear, OneNamespaceIsGoneForGood) {
  const NamespaceId other = make_namespace("other");
  for (int i = 0; i < 100; ++i) {
    put_all(i, i + 1);
    if (i % 3 == 0) put_in(other, i);
  }
  close();
  const auto cleared = clear_store(path(), {.prepared_before_unix_s = {}, .ns = other});
  ASSERT_TRUE(cleared.ok()) << cleared.status().to_string();
  EXPECT_EQ(cleared->records, 34u);
  if (GetParam()) {  // footers gone too: the walk steps over what was cleared
    for (const std::uint64_t region : {0, 1, 2}) {
      std::fstream file(root / "nvme" / "data.000", std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(static_cast<std::streamoff>((region + 1) * options.region_bytes - 64));
      file.put('!');
    }
  }
  const StoreReport found = report(true);
  EXPECT_EQ(found.records, 100u);
  ASSERT_EQ(found.namespaces.size(), 1u);
  EXPECT_EQ(found.namespaces[0].ns, ns);
  EXPECT_TRUE(verify_store(path(), nullptr)->bad.empty());
  open();
  EXPECT_EQ(store->stats().recovered_chunks, 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(get(i), "hit") << i;
  put_in(other, 5);
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 101u);
}
INSTANTIATE_TEST_SUITE_P(Footers, InspectClear, testing::Bool());

TEST_F(Inspect, WhatIsOlderGoesByRegion) {
  put_all(0, 130);  // two regions full, one begun
  close();
  StoreReport before = report();
  ASSERT_EQ(before.regions[0].records, 63u);
  ASSERT_EQ(clear_store(path(), {.prepared_before_unix_s = before.regions[0].prepared_unix_s, .ns = {}})->records, 0u);
  // Makes region 0 older than the others, as its header says it.
  std::fstream file(root / "nvme" / "data.000", std::ios::in | std::ios::out | std::ios::binary);
  nvme::RegionHeader header;
  file.read(reinterpret_cast<char*>(&header), sizeof header);
  header.prepared_unix_s -= 1000;
  nvme::seal_page(header);
  file.seekp(0);
  file.write(reinterpret_cast<const char*>(&header), sizeof header);
  file.close();
  const auto cleared = clear_store(path(), {.prepared_before_unix_s = before.regions[0].prepared_unix_s - 500, .ns = {}});
  ASSERT_TRUE(cleared.ok()) << cleared.status().to_string();
  EXPECT_EQ(cleared->records, 63u);
  EXPECT_EQ(cleared->regions, 1u);
  EXPECT_LT(report().allocated_bytes, before.allocated_bytes - (3u << 20));
  open();
  EXPECT_EQ(store->stats().recovered_chunks, 67u);
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(get(100), "hit");
  put_all(200, 400);
  reopen();
  EXPECT_EQ(get(399), "hit");
}

}  // namespace
}  // namespace lmcn
