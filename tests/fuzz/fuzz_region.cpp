// Region headers, and the walk over an open region's records. Input: a byte of flags, then edits of data.000, one after another.
//   1  the checksum of each page that was edited is made to fit
//   2  the checkpoint is there
//   4  the store with many small records
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

template <class Page>
void put_page(std::byte* at, Page& page, std::uint64_t magic) {
  page.magic = magic;
  nvme::seal_page(page);
  std::memcpy(at, &page, sizeof page);
}

std::uint64_t sequence_from(const MadeStore& store, Input& input) {
  const auto choice = input.take<std::uint8_t>();
  if (choice < store.region_sequences.size()) return store.region_sequences[choice];
  return choice < 0x80 ? choice : input.take<std::uint64_t>();
}

// One edit; whether what it left in the page has a checksum that was made to fit, or is a record's header in another place: its
// region's log finds it there, and reading it fails.
bool edit(const MadeStore& store, std::span<std::byte> data, Input& input) {
  const auto kind = input.take<std::uint8_t>();
  const std::uint32_t page = input.take<std::uint16_t>() % static_cast<std::uint32_t>(data.size() / kPageBytes);
  std::byte* const at = data.data() + page * kPageBytes;
  switch (kind % 5) {
    case 0: {  // bytes
      const std::size_t offset = input.take<std::uint16_t>() % kPageBytes;
      const Bytes bytes = input.take_bytes(input.take<std::uint8_t>());
      std::copy_n(bytes.begin(), std::min(bytes.size(), kPageBytes - offset), at + offset);
      return false;
    }
    case 1: {  // a region header
      nvme::RegionHeader header{};
      header.uuid = store.uuid;
      const auto number = input.take<std::uint8_t>();
      header.region = number < 0x80 ? page / store.region_pages : number;
      header.sequence = sequence_from(store, input);
      header.epoch = 3 + input.take<std::uint8_t>() / 0x80;
      put_page(at, header, nvme::kRegionMagic);
      return true;
    }
    case 2: {  // a skip header
      nvme::SkipHeader header{};
      header.uuid = store.uuid;
      header.region_sequence = sequence_from(store, input);
      header.pages = input.take<std::uint8_t>();
      if (header.pages >= 0x80) header.pages = input.take<std::uint32_t>();
      put_page(at, header, nvme::kSkipMagic);
      return true;
    }
    case 3: {  // a slot header; the payload is what lies behind it
      const std::uint64_t sequence = sequence_from(store, input);
      const auto record_sequence = input.take<std::uint32_t>();
      const auto id = input.take<std::uint8_t>();
      std::uint64_t payload_bytes = std::uint64_t{input.take<std::uint16_t>()} + 1;
      if (payload_bytes > 0xFF00) payload_bytes = input.take<std::uint64_t>();
      SlotHeader& header = *slot_header(at);
      const bool possible = payload_bytes >= 1 && payload_bytes <= kMaxPayloadBytes;
      begin_slot(at, key_of(id), store_namespace(), possible ? payload_bytes : 1, 1, 1);
      header.payload_bytes = payload_bytes;
      header.region_sequence = sequence;
      header.record_sequence = record_sequence;
      repair_slot_root(at);
      return true;
    }
    default: {  // the copy of another page
      const std::uint32_t from = input.take<std::uint16_t>() % static_cast<std::uint32_t>(data.size() / kPageBytes);
      std::memmove(at, data.data() + from * kPageBytes, kPageBytes);
      return slot_header(at)->magic == kSlotMagic;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  const MadeStore& store = (flags & 4) != 0 ? large_store() : small_store();
  StoreFiles files = store.files;
  if ((flags & 2) == 0) files.has_checkpoint = false;
  bool forged = false;
  for (int edits = 0; !input.empty() && edits < 32; ++edits) {
    Input next = input;
    const auto kind_and_page = next.take<std::uint32_t>();
    forged |= edit(store, files.data, input);
    if ((flags & 1) == 0) continue;
    const std::uint32_t page = ((kind_and_page >> 8) & 0xFFFF) % static_cast<std::uint32_t>(files.data.size() / kPageBytes);
    repair_page(files.data, store.region_pages, page);
    forged = true;
  }
  open_and_check(store, files, {.only_what_was_written = !forged, .payloads_as_written = false});
  return 0;
}
