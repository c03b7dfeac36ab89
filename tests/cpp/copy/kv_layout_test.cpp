#include "lmcn/kv_layout.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace lmcn {
namespace {

PagedKvLayout two_layers() {
  static std::byte memory[2][4096];
  PagedKvLayout kv;
  kv.num_blocks = 4;
  kv.block_tokens = 4;
  kv.heads = 2;
  kv.head_dim = 8;
  kv.element_bytes = 2;
  for (auto& m : memory) kv.layers.push_back({m, {{0, 256, 32, 16, 2}, {128, 256, 32, 16, 2}}});
  return kv;
}

TEST(PagedKvLayout, AcceptsWhatIsRight) {
  EXPECT_TRUE(two_layers().validate().ok());
  PagedKvLayout transposed = two_layers();
  for (PagedLayer& layer : transposed.layers) layer.planes[0] = {0, 256, 2, 64, 8};
  EXPECT_TRUE(transposed.validate().ok());
  PagedKvLayout below = two_layers();  // K and V in allocations of their own, V at the lower address
  below.layers[0] = {below.layers[1].base, {{0, 256, 32, 16, 2}, {below.layers[0].base - below.layers[1].base, 256, 32, 16, 2}}};
  EXPECT_TRUE(below.validate().ok());
}

TEST(PagedKvLayout, NamesFieldValueAndWhatWouldBeRight) {
  struct Wrong {
    const char* message;
    std::function<void(PagedKvLayout&)> spoil;
    Code code = Code::kInvalidArgument;
  };
  const std::vector<Wrong> wrongs = {
      {"num_blocks is 0, must be >= 1", [](auto& kv) { kv.num_blocks = 0; }},
      {"block_tokens is -1, must be >= 1", [](auto& kv) { kv.block_tokens = -1; }},
      {"heads is 0, must be >= 1", [](auto& kv) { kv.heads = 0; }},
      {"head_dim is 0, must be >= 1", [](auto& kv) { kv.head_dim = 0; }},
      {"element_bytes is 0, must be >= 1", [](auto& kv) { kv.element_bytes = 0; }},
      {"over 63 bits", [](auto& kv) { kv.heads = INT64_MAX / 2; }},
      {"layers is empty", [](auto& kv) { kv.layers.clear(); }},
      {"layers[1].base is null", [](auto& kv) { kv.layers[1].base = nullptr; }},
      {"layers[1].planes is 3, must be 1", [](auto& kv) { kv.layers[1].planes.resize(3); }},
      {"layers[0].planes is 0, must be 1", [](auto& kv) { kv.layers[0].planes.clear(); }},
      {"layers[1].planes is 1, must be 2 as in layers[0]", [](auto& kv) { kv.layers[1].planes.pop_back(); }},
      {"layers[0].planes[1].token is 31, must be >= 32", [](auto& kv) { kv.layers[0].planes[1].token = 31; }},
      {"layers[0].planes[0].block is -256, must be >= 2", [](auto& kv) { kv.layers[0].planes[0].block = -256; }},
      {"layers[0].planes[0].block is 127, must be >= 128", [](auto& kv) { kv.layers[0].planes[0].block = 127; }},
      {"layers[0].planes[0].dim is 0, must be >= 2", [](auto& kv) { kv.layers[0].planes[0].dim = 0; }},
      {"layers[0].planes[0].block is 4611686018427387904", [](auto& kv) { kv.layers[0].planes[0].block = std::int64_t{1} << 62; }},
      {"layers[1].planes[0].offset is -9223372036854775808", [](auto& kv) { kv.layers[1].planes[0].offset = INT64_MIN; }},
      {"layers[1].planes[1].offset is 9223372036854775807", [](auto& kv) { kv.layers[1].planes[1].offset = INT64_MAX; }},
      {"K and V would share bytes", [](auto& kv) { kv.layers[1].planes[1].offset = 0; }},
      {"layers[0].planes[0].dim is 12 with element_bytes 3",
       [](auto& kv) {
         kv.element_bytes = 3;
         for (auto& layer : kv.layers) layer.planes = {{0, 2048, 3, 512, 12}};
       },
       Code::kUnsupported},
  };
  for (const Wrong& wrong : wrongs) {
    PagedKvLayout kv = two_layers();
    wrong.spoil(kv);
    const Status status = kv.validate();
    EXPECT_EQ(status.code(), wrong.code) << wrong.message;
    EXPECT_NE(status.message().find(wrong.message), std::string::npos) << status.message();
    EXPECT_EQ(SlotLayout::make(kv, 8).status().code(), wrong.code);
  }
}

TEST(PagedKvLayout, OpaquePagesAreTokensOfOnePlane) {
  std::byte memory[2];
  const PagedKvLayout kv = PagedKvLayout::opaque({&memory[0], &memory[1]}, 10, 3000, 4096);
  ASSERT_TRUE(kv.validate().ok());
  EXPECT_EQ(kv.layers.size(), 2u);
  EXPECT_EQ(kv.layers[1].base, &memory[1]);
  EXPECT_EQ(kv.layers[0].planes.size(), 1u);
  EXPECT_EQ(kv.block_tokens, 1);
  EXPECT_EQ(kv.token_bytes(), 3000);
  EXPECT_EQ(kv.layers[0].planes[0].block, 4096);
  const Status overlapping = PagedKvLayout::opaque({&memory[0]}, 10, 3000, 2999).validate();
  EXPECT_NE(overlapping.message().find("block is 2999, must be >= 3000"), std::string::npos) << overlapping.message();
}

TEST(SlotLayout, PacksSmallLayersAndAlignsLargeOnes) {
  const SlotLayout small = SlotLayout::make(3, 2, 100, 7).value();
  EXPECT_EQ(small.layer_offset, (std::vector<std::int64_t>{0, 1400, 2800}));
  EXPECT_EQ(small.plane_bytes, 700);
  EXPECT_EQ(small.rank_bytes, 8192);
  const SlotLayout below = SlotLayout::make(2, 1, 65535, 1).value();
  EXPECT_EQ(below.layer_offset, (std::vector<std::int64_t>{0, 65535}));
  EXPECT_EQ(below.rank_bytes, 131072);
  const SlotLayout exact = SlotLayout::make(2, 1, 65536, 1).value();
  EXPECT_EQ(exact.layer_offset, (std::vector<std::int64_t>{0, 65536}));
  const SlotLayout large = SlotLayout::make(3, 2, 32769, 1).value();
  EXPECT_EQ(large.layer_offset, (std::vector<std::int64_t>{0, 69632, 139264}));
  EXPECT_EQ(large.rank_bytes, 3 * 69632);
}

TEST(SlotLayout, TheSameFromSizesAloneAndFromTheLayout) {
  const PagedKvLayout kv = two_layers();
  const SlotLayout a = SlotLayout::make(kv, 8).value(), b = SlotLayout::make(2, 2, kv.token_bytes(), 8).value();
  EXPECT_EQ(a.layer_offset, b.layer_offset);
  EXPECT_EQ(a.plane_bytes, b.plane_bytes);
  EXPECT_EQ(a.rank_bytes, b.rank_bytes);
  EXPECT_EQ(a.chunk_tokens, 8);
}

TEST(SlotLayout, NamesWhatIsWrong) {
  const auto message = [](std::int64_t layers, std::int64_t planes, std::int64_t token_bytes, std::int64_t chunk_tokens) {
    const auto made = SlotLayout::make(layers, planes, token_bytes, chunk_tokens);
    return made.ok() ? std::string("ok") : made.status().to_string();
  };
  EXPECT_NE(message(0, 2, 1, 1).find("invalid_argument: layers is 0"), std::string::npos);
  EXPECT_NE(message(1, 3, 1, 1).find("planes is 3"), std::string::npos);
  EXPECT_NE(message(1, 1, 0, 1).find("token_bytes is 0"), std::string::npos);
  EXPECT_NE(message(1, 1, 1, 0).find("chunk_tokens is 0"), std::string::npos);
  EXPECT_NE(message(1, 1, 1, std::int64_t{1} << 31).find("chunk_tokens is 2147483648"), std::string::npos);
  EXPECT_NE(message(1, 1, std::int64_t{1} << 62, 4).find("over 63 bits"), std::string::npos);
  EXPECT_NE(message(std::int64_t{1} << 62, 1, 4, 1).find("over 63 bits"), std::string::npos);
  EXPECT_NE(message(1, 2, INT64_MAX / 2, 1).find("over 63 bits"), std::string::npos);
}

}  // namespace
}  // namespace lmcn
