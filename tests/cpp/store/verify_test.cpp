// StoreOptions::verify.
#include <fstream>

#include "base/seq_points.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Verify : public StoreTest {
 protected:
  std::byte* payload_of(int i) {
    std::lock_guard lock(store->mu);
    return store->image(store->index.entry(store->index.find(key(i))).host_slot) + kPageBytes;
  }
  void flip_on_disk(int i) {
    Extent extent;
    {
      std::lock_guard lock(store->mu);
      extent = store->index.entry(store->index.find(key(i))).extent;
    }
    const std::uint64_t at = extent.region * options.region_bytes + extent.page * kPageBytes + kPageBytes + 100;
    std::fstream file(root / "nvme" / "data.000", std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(at));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(byte ^ 1));
    ASSERT_TRUE(file.good());
  }
};

TEST_F(Verify, AllFindsAFlippedBitInHostMemory) {
  options.verify = "all";
  open();
  put_all(0, 3);
  EXPECT_EQ(get(1), "hit");
  payload_of(1)[777] ^= std::byte{4};
  EXPECT_EQ(get(1), "miss");
  EXPECT_EQ(store->stats().corrupt_host_chunks, 1u);
  EXPECT_EQ(get(0), "hit");
  EXPECT_EQ(get(2), "hit");
  EXPECT_TRUE(put(1));
  EXPECT_EQ(get(1), "hit");
}

TEST_F(Verify, AllTakesTheRecordWhereTheHostCopyIsWrong) {
  options.verify = "all";
  with_nvme();
  open();
  put_all(0, 3);
  flush();
  payload_of(1)[777] ^= std::byte{4};
  EXPECT_EQ(get(1), "hit") << "from NVMe";
  EXPECT_EQ(store->stats().corrupt_host_chunks, 1u);
  EXPECT_EQ(store->stats().promoted_chunks, 1u);
  EXPECT_EQ(get(1), "hit") << "checked, so its checksum was taken";
  payload_of(1)[1] ^= std::byte{4};
  EXPECT_EQ(get(1), "hit");
  EXPECT_EQ(store->stats().corrupt_host_chunks, 2u);
}

TEST_F(Verify, AllAnswersOnlyAfterTheCheck) {
  options.verify = "all";
  open();
  put_all(0, 2);
  EXPECT_EQ(get(0), "hit");  // the checksums of both were taken
  SeqPoints::hold("store.before_check");
  SeqPointScope scope;
  auto request = store->begin_request(ns, {});
  EXPECT_EQ(request->lookup(key(0)), Presence::kRetry);
  ASSERT_TRUE(SeqPoints::wait_until_reached("store.before_check", 20s));
  EXPECT_EQ(request->lookup(key(0)), Presence::kRetry);
  EXPECT_EQ(request->acquire(keys(0, 1), false).status().code(), Code::kNotFound) << "not before it was checked";
  payload_of(0)[5] ^= std::byte{1};
  SeqPoints::release("store.before_check");
  Presence presence = Presence::kRetry;
  while (presence == Presence::kRetry) presence = request->lookup(key(0));
  EXPECT_EQ(presence, Presence::kMiss);
  EXPECT_EQ(request->lookup_prefix(keys(1, 2)).next, Presence::kRetry);
  while (request->lookup(key(1)) == Presence::kRetry) {
  }
  auto lease = request->acquire(keys(1, 2), false);
  ASSERT_TRUE(lease.ok()) << lease.status().to_string();
  EXPECT_TRUE(holds(lease->payload(0), 1));
}

TEST_F(Verify, ByDefaultWhatComesFromNvmeIsChecked) {
  with_nvme();
  open();
  put_all(0, 1);
  flush();
  flip_on_disk(0);
  evict_all(1000);
  EXPECT_EQ(get(0), "miss");
  EXPECT_EQ(store->stats().corrupt_records, 1u);
}

TEST_F(Verify, OffLooksAtTheIdentityOnly) {
  options.verify = "off";
  with_nvme();
  open();
  put_all(0, 2);
  flush();
  flip_on_disk(0);
  evict_all(1000);
  EXPECT_EQ(get(0), "wrong");
  const NamespaceId other = make_namespace("other");
  EXPECT_FALSE(store->acquire(other, keys(1, 2), 10s).ok());
  EXPECT_EQ(store->stats().misplaced_reads, 1u);
}

}  // namespace
}  // namespace lmcn
