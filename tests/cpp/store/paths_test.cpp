// Several NVMe paths: striping, limits, and one that fails while the others go on.
#include <sys/stat.h>

#include "nvme/striped_log.hpp"
#include "store_fixture.hpp"

namespace lmcn {
namespace {

class Paths : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    options.directories = {path(0), path(1), path(2)};
    options.nvme_bytes = 3 * (32 << 20);
    options.region_bytes = 4 << 20;
    wrap_engine = [this](std::unique_ptr<io::IoEngine> inner) {
      auto wrapped = std::make_unique<io::FaultyEngine>(std::move(inner));
      faulty.push_back(wrapped.get());
      return wrapped;
    };
  }
  std::string path(int i) const { return (root / ("nvme" + std::to_string(i))).string(); }
  std::uint64_t allocated(int i) const {
    std::uint64_t bytes = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path(i))) {
      struct stat found{};
      EXPECT_EQ(::stat(entry.path().c_str(), &found), 0);
      bytes += static_cast<std::uint64_t>(found.st_blocks) * 512;
    }
    return bytes;
  }
  std::uint32_t path_holding(int i) {
    std::lock_guard lock(store->mu);
    const EntryId id = store->index.find(key(i));
    return id == kNoEntry || !store->index.entry(id).extent.valid() ? 99 : nvme::path_of(store->index.entry(id).extent);
  }
  std::vector<io::FaultyEngine*> faulty;  // by path
};

TEST_F(Paths, ChunksAreStripedAndFoundAgain) {
  open();
  put_all(0, 90);
  flush();
  int on[3] = {};
  for (int i = 0; i < 90; ++i) ++on[path_holding(i)];
  for (const int count : on) EXPECT_EQ(count, 30);
  EXPECT_EQ(store->stats().nvme_paths, 3u);
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 90u);
  for (int i = 0; i < 90; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(Paths, EachKeepsItsOwnLimit) {
  options.directory_bytes = {24 << 20, 48 << 20, 24 << 20};
  open();
  for (int i = 0; i < 3000; ++i) {
    put(i);
    if (i % 64 == 0) flush();
  }
  flush();
  EXPECT_GT(store->stats().reclaimed_regions, 0u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_LE(allocated(i), options.directory_bytes[static_cast<std::size_t>(i)]) << i;
    EXPECT_GT(allocated(i), options.directory_bytes[static_cast<std::size_t>(i)] / 2) << i;
  }
  EXPECT_EQ(store->stats().nvme_limit_bytes, options.nvme_bytes);
}

TEST_F(Paths, OneThatFailsIsQuarantinedAndTheOthersGoOn) {
  open();
  put_all(0, 30);
  flush();
  std::vector<int> lost, kept;
  for (int i = 0; i < 30; ++i) (path_holding(i) == 1 ? lost : kept).push_back(i);
  ASSERT_EQ(lost.size(), 10u);
  faulty[1]->add(io::Fault::fail_with(EIO));
  put_all(30, 60);
  flush();
  EXPECT_EQ(store->stats().nvme_lost_paths, 1u);
  EXPECT_TRUE(store->nvme_ready());
  EXPECT_NE(store->nvme_warning().find("1 of 3 NVMe paths not in use"), std::string::npos) << store->nvme_warning();
  EXPECT_NE(store->nvme_warning().find(path(1)), std::string::npos) << store->nvme_warning();
  evict_all(1000);
  for (const int i : lost) EXPECT_EQ(store->lookup(keys(i, i + 1)).hit, 0u) << i;
  for (const int i : kept) EXPECT_EQ(get(i), "hit") << i;
  put_all(60, 90);
  flush();
  for (int i = 60; i < 90; ++i) EXPECT_NE(path_holding(i), 1u) << i;
  EXPECT_EQ(get(lost[0]), "miss");
  ASSERT_TRUE(put(lost[0])) << "and can be stored anew, elsewhere";
  flush();
  EXPECT_NE(path_holding(lost[0]), 1u);
  EXPECT_NE(path_holding(lost[0]), 99u);
}

TEST_F(Paths, OneThatNeverAnswersHoldsUpNoOther) {
  options.nvme_io_timeout = 2s;  // more than the others take on a busy machine
  options.admission = "always";  // chunks that wait for the silent one would look like a device that is behind
  open();
  put_all(0, 30);
  flush();
  faulty[1]->add(io::Fault::hold());
  put_all(30, 70);
  ASSERT_TRUE(faulty[1]->wait_withheld(1));
  ASSERT_TRUE(becomes([&] { return store->stats().nvme_lost_paths != 0; }));
  EXPECT_EQ(store->stats().nvme_lost_paths, 1u) << "and no other";
  put_all(70, 100);
  flush();
  for (int i = 70; i < 100; ++i) EXPECT_TRUE(path_holding(i) == 0 || path_holding(i) == 2) << i;
  evict_all(1000);
  EXPECT_EQ(get(99), "hit");
  faulty[1]->clear();
  faulty[1]->release();
}

TEST_F(Paths, OneThatIsNotThereAtStartIsLeftOut) {
  open();
  put_all(0, 30);
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  std::filesystem::rename(path(1), root / "elsewhere");
  std::filesystem::create_directory(path(1));
  std::filesystem::permissions(path(1), std::filesystem::perms::owner_all);
  std::filesystem::create_directory(std::filesystem::path(path(1)) / "LOCK");  // EISDIR
  open();
  EXPECT_EQ(store->stats().nvme_lost_paths, 1u);
  EXPECT_NE(store->io_engine_note().find(path(1) + " left out"), std::string::npos) << store->io_engine_note();
  EXPECT_EQ(store->stats().recovered_chunks, 20u);
  put_all(30, 60);
  flush();
  ASSERT_TRUE(store->close(10s).ok());
  store.reset();
  std::filesystem::remove_all(path(1));
  std::filesystem::rename(root / "elsewhere", path(1));
  open();
  EXPECT_EQ(store->stats().nvme_lost_paths, 0u);
  for (int i = 0; i < 60; ++i) EXPECT_EQ(get(i), "hit") << i;
}

TEST_F(Paths, AKeyThatLiesOnTwoPathsIsOneChunk) {
  open();
  put_all(0, 30);
  flush();
  {
    std::lock_guard lock(store->mu);
    Entry& entry = store->index.entry(store->index.find(key(7)));
    entry.extent = Extent{};  // as if a clear of the other path had failed
    store->mark_dirty(store->index.find(key(7)));
  }
  store->keeper_cv.notify_one();
  flush();
  put_all(30, 31);
  flush();
  ASSERT_NE(path_holding(7), 99u);
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 31u);
  EXPECT_EQ(get(7), "hit");
}

TEST_F(Paths, ClearedOnAll) {
  open();
  put_all(0, 30);
  flush();
  store->clear();
  flush();
  reopen();
  EXPECT_EQ(store->stats().recovered_chunks, 0u);
}

TEST_F(Paths, WrongOnesAreNamed) {
  const auto refused = [&](const std::string& what) {
    auto opened = TieredStore::open(options);
    ASSERT_FALSE(opened.ok());
    EXPECT_EQ(opened.status().code(), Code::kInvalidArgument);
    EXPECT_NE(opened.status().message().find(what), std::string::npos) << opened.status().message();
  };
  options.directory_bytes = {1, 2};
  refused("directory_bytes");
  options.directory_bytes.clear();
  options.directories[2] = path(0) + "/../nvme0";
  refused("one directory");
  options.directories = {path(0), path(1), path(2), path(3), path(4), path(5), path(6), path(7)};
  refused("1..7");
}

}  // namespace
}  // namespace lmcn
