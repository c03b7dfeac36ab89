#include "index/eviction_policy.hpp"

#include <algorithm>
#include <cctype>
#include <string>

#include "index/chunk_index.hpp"
#include "index/lfu_policy.hpp"
#include "index/list_policy.hpp"
#include "index/s3fifo_policy.hpp"

namespace lmcn {
namespace {

std::string upper(std::string_view name) {
  std::string text(name);
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return text;
}

}  // namespace

Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name, KeyBits key_bits) {
  const std::string wanted = upper(name);
  std::unique_ptr<EvictionPolicy> policy;
  if (wanted == "LRU") policy = std::make_unique<ListPolicy>(ListOrder::kLeastRecent);
  if (wanted == "S3FIFO") policy = std::make_unique<S3FifoPolicy>(std::move(key_bits));
  if (wanted == "FIFO") policy = std::make_unique<ListPolicy>(ListOrder::kOldest);
  if (wanted == "MRU") policy = std::make_unique<ListPolicy>(ListOrder::kMostRecent);
  if (wanted == "LFU") policy = std::make_unique<LfuPolicy>();
  if (policy) return policy;
  return Status(Code::kInvalidArgument, "cache_policy is \"" + std::string(name) +
                                            "\", which is not known; available: \"LRU\", \"S3FIFO\", \"LFU\", \"FIFO\", \"MRU\"");
}

Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name, const ChunkIndex& index) {
  // Bits that the index's table does not use.
  return make_eviction_policy(name, [&index](EntryId id) { return static_cast<std::uint32_t>(index.entry(id).key.prefix64()); });
}

}  // namespace lmcn
