// The slot image: what verify_slot() lets through. Input: a byte of flags, a byte for the payload's tail, then the image.
//   1  the root is made to fit
//   2  the image's checksum table and root are made to fit its header, if the header is possible
//   4  the bytes are laid over a whole image
// The image ends where the input (or the whole image) does: reading beyond is AddressSanitizer's to see.
#include <memory>

#include "memory/checksum.hpp"
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

void check_bounds(const SlotHeader& header, std::size_t available_bytes) {
  require(header.payload_bytes >= 1 && header.payload_bytes <= kMaxPayloadBytes, "payload_bytes out of bounds");
  require(image_bytes(header.payload_bytes) <= available_bytes, "the image is longer than what is there");
  require(header.rank_count >= 1 && header.rank_count <= kMaxRanks && header.payload_bytes % header.rank_count == 0, "rank_count");
  require(header.segment_count >= 1 && header.segment_count <= kMaxSegments, "segment_count");
  require(std::uint64_t{header.segment_count - 1} * header.segment_bytes < header.payload_bytes &&
              std::uint64_t{header.segment_count} * header.segment_bytes >= header.payload_bytes,
          "segments do not cover the payload");
}

void make_table_fit(std::byte* image) {
  SlotHeader& header = *slot_header(image);
  for (std::uint32_t i = 0; i < header.segment_count; ++i) {
    const std::uint64_t begin = std::uint64_t{i} * header.segment_bytes;
    header.segment[i] =
        checksum64(image + kPageBytes + begin, std::min<std::uint64_t>(header.segment_bytes, header.payload_bytes - begin));
  }
  repair_slot_root(image);
}

// An image that verifies: any one byte of key, namespace, table or payload changed, it does not.
void check_one_byte_off(std::byte* image, std::size_t bytes, std::uint64_t where) {
  const ChunkKey key = slot_header(image)->key;
  const NamespaceId ns = slot_header(image)->ns;
  const std::uint64_t payload_bytes = slot_header(image)->payload_bytes;
  const std::uint64_t covered = offsetof(SlotHeader, rank) + payload_bytes;
  std::uint64_t at = where % covered;
  if (at >= offsetof(SlotHeader, rank)) at += kPageBytes - offsetof(SlotHeader, rank);
  image[at] ^= std::byte{0x40};
  require(!verify_slot(image, bytes, key, ns).ok(), "byte " + std::to_string(at) + " is changed and the image verifies");
  image[at] ^= std::byte{0x40};
  require(verify_slot(image, bytes, key, ns).ok(), "changed back, it does not verify");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  const std::uint64_t pages = 1 + input.take<std::uint8_t>() % 40;
  const auto where = input.take<std::uint32_t>();
  Bytes bytes = input.rest();
  if ((flags & 4) != 0) {
    const std::uint64_t payload_bytes = (pages - 1) * kPageBytes + 1 + where % kPageBytes;
    Bytes whole(image_bytes(payload_bytes));
    begin_slot(whole.data(), key_of(1), store_namespace(), payload_bytes, 1, 1);
    seal_slot(whole.data(), 7, 9);
    std::copy_n(bytes.begin(), std::min(bytes.size(), whole.size()), whole.begin());
    bytes = std::move(whole);
  }
  // Aligned as slots are, and not one byte longer than it says.
  const std::unique_ptr<std::byte[]> owned(new std::byte[std::max<std::size_t>(bytes.size(), 1)]);
  std::byte* const image = owned.get();
  std::copy(bytes.begin(), bytes.end(), image);
  if ((flags & 3) != 0 && bytes.size() >= kPageBytes) {
    repair_slot_root(image);
    if ((flags & 2) != 0 && check_header(image, bytes.size()).ok()) make_table_fit(image);
  }

  const Status status = check_header(image, bytes.size());
  require(status.ok() || status.code() == Code::kCorruption || status.code() == Code::kFormatVersion, status.to_string());
  if (!status.ok()) {
    require(!verify_slot(image, bytes.size(), key_of(1), store_namespace()).ok(), "verifies without a header");
    return 0;
  }
  const SlotHeader& header = *slot_header(image);
  check_bounds(header, bytes.size());
  require(!verify_slot(image, bytes.size(), key_of(2), header.ns).ok() || header.key == key_of(2), "another key");
  const bool whole = verify_slot(image, bytes.size(), header.key, header.ns).ok();
  require(whole || (flags & 2) == 0, "table and root fit and it does not verify");
  if (whole) check_one_byte_off(image, bytes.size(), where);
  for (std::uint32_t rank = 0; rank <= kMaxRanks; ++rank) {
    const RankState state = rank_state(image, rank, header.generation);
    require(state == RankState::kEmpty || state == RankState::kOk || state == RankState::kFailed, "rank state");
  }
  // What was adopted and sealed anew verifies.
  adopt_slot(image, 5, header.rank_count);
  seal_slot(image, 1, 2);
  require(verify_slot(image, bytes.size(), header.key, header.ns).ok(), "sealed anew, it does not verify");
  return 0;
}
