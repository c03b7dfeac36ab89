// Input: a byte of flags, then the bytes of the file.
//   1  they are laid over a whole superblock, and its checksum is made to fit
//   2  there is no data.000
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

// open() trusts region_bytes where the checksum holds: values that no store was ever made with are left out.
void keep_possible_region_bytes(const MadeStore& store, Bytes& superblock) {
  constexpr std::uint64_t kMaxRegionBytes = 1ull << 43;
  std::byte* const at = superblock.data() + offsetof(nvme::Superblock, region_bytes);
  std::uint64_t region_bytes = 0;
  std::memcpy(&region_bytes, at, sizeof region_bytes);
  if (region_bytes != 0 && region_bytes % kPageBytes == 0 && region_bytes <= kMaxRegionBytes) return;
  region_bytes = store.region_pages * kPageBytes;
  std::memcpy(at, &region_bytes, sizeof region_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const MadeStore& store = small_store();
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  const bool forged = (flags & 1) != 0;
  StoreFiles files = store.files;
  files.has_data = (flags & 2) == 0;
  const Bytes bytes = input.rest();
  if (forged) {
    const std::size_t count = std::min(bytes.size(), files.superblock.size());
    std::copy_n(bytes.begin(), count, files.superblock.begin());
    keep_possible_region_bytes(store, files.superblock);
    repair_page(files.superblock, 1, 0);
  } else {
    files.superblock = bytes;
  }
  // Records that were written stay what they are: at most they are not found any more.
  open_and_check(store, files, {.refusal_allowed = true, .only_what_was_written = files.has_data, .payloads_as_written = true});
  return 0;
}
