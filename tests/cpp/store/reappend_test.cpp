// What reclaim writes again is counted apart, over restarts too.
#include "store_fixture.hpp"

namespace lmcn {
namespace {

TEST_F(StoreTest, ReappendedBytesAreCountedApart) {
  with_nvme(32 << 20);
  open();
  for (int i = 0; store->stats().reclaimed_regions < 2; ++i) {
    ASSERT_LT(i, 5000);
    ASSERT_TRUE(put(i));
    flush();
    ASSERT_EQ(get(0), "hit");  // stays in host memory, and worth keeping
  }
  flush();
  const nvme::LogStats before = store->log->stats();
  EXPECT_GE(before.reappended_bytes, kPayload);
  EXPECT_LT(before.reappended_bytes, before.appended_bytes / 10);
  EXPECT_EQ(before.lifetime.first_bytes + before.lifetime.reappended_bytes, before.appended_bytes);
  reopen();
  const nvme::LogStats after = store->log->stats();
  EXPECT_EQ(after.reappended_bytes, 0u);
  EXPECT_EQ(after.lifetime.reappended_bytes, before.lifetime.reappended_bytes);
  EXPECT_EQ(after.lifetime.since_unix_s, before.lifetime.since_unix_s);
  EXPECT_EQ(get(0), "hit");
}

}  // namespace
}  // namespace lmcn
