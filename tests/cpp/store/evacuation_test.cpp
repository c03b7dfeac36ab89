// What was used since it was written outlives the reclaim of its region, also when host memory no longer has it.
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Evacuation : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    with_nvme(32 << 20);  // 7 regions of 4 MiB, 62 chunks each
    options.host_bytes = 5 << 20;
    open();
  }
  /// Writes fillers until `regions` more were reclaimed.
  void reclaim(std::uint64_t regions) {
    const std::uint64_t wanted = store->stats().reclaimed_regions + regions;
    while (store->stats().reclaimed_regions < wanted) {
      for (int i = 0; i < 32; ++i) ASSERT_TRUE(put(filler_++));
      flush();
    }
    flush();  // what is written again is written now
  }
  int filler_ = 10'000;
};

TEST_F(Evacuation, ChunksThatWereUsedAreWrittenAgain) {
  put_all(0, 60);
  flush();
  for (const int i : {3, 4, 5}) EXPECT_EQ(get(i), "hit");
  evict_all(5000);
  flush();
  for (const int i : {3, 4, 5}) ASSERT_TRUE(on_nvme_only(i)) << i;
  reclaim(3);
  for (const int i : {3, 4, 5}) EXPECT_EQ(get(i), "hit") << i;
  EXPECT_EQ(get(20), "miss") << "nobody asked for it";
  EXPECT_GE(store->stats().reappended_chunks, 3u);
  reopen();
  EXPECT_EQ(get(4), "hit");
}

TEST_F(Evacuation, NoMoreThanTheShareIsWrittenAgain) {
  put_all(0, 60);
  flush();
  for (int i = 0; i < 60; ++i) ASSERT_EQ(get(i), "hit");
  for (const int i : {50, 51}) ASSERT_EQ(get(i), "hit");  // used more than the others
  evict_all(5000);
  flush();
  reclaim(1);
  const std::uint64_t again = store->stats().reappended_chunks;
  EXPECT_GE(again, 4u);
  EXPECT_LE(again, 60 * 15 / 100 + 1);
  for (const int i : {50, 51}) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(Evacuation, ADeviceThatDoesNotAnswerDelaysAReclaimNoLongerThanThePatience) {
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  io::FaultyEngine* faulty = nullptr;
  wrap_engine = [&](std::unique_ptr<io::IoEngine> inner) {
    auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
    faulty = wrapped.get();
    return wrapped;
  };
  open();
  put_all(0, 60);
  flush();
  for (const int i : {3, 4, 5}) EXPECT_EQ(get(i), "hit");
  evict_all(5000);
  flush();
  const auto hold = faulty->add(io::Fault::hold().on(io::Op::kRead));
  reclaim(2);
  EXPECT_GE(faulty->withheld(), 3u) << "they were being read back";
  faulty->remove(hold);
  faulty->release();
  wait_for_promotions();
  for (const int i : {3, 4, 5}) EXPECT_EQ(get(i), "miss") << "the region was written over";
  EXPECT_EQ(store->stats().corrupt_records, 0u);
}

}  // namespace
}  // namespace lmcn
