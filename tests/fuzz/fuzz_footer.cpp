// Input: a byte of flags, then
//   0  the bytes that end a region, as they are
//   1  the same, with the checksum made to fit
//   2  the same, and magic, version, uuid, region sequence and footer_pages as they should be
//   4  what a footer is built from: its entries in a short form
//   8  the store with many small records, whose footers have two pages
//  16  in region 1, else in region 0
//  32  the checkpoint is there
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

void make_identity_fit(const MadeStore& store, std::span<std::byte> region, std::uint32_t number) {
  nvme::FooterTrailer trailer;
  std::byte* const at = region.data() + region.size() - sizeof trailer;
  std::memcpy(&trailer, at, sizeof trailer);
  trailer.magic = nvme::kFooterMagic;
  trailer.format = kFormatVersion;
  trailer.uuid = store.uuid;
  trailer.sequence = store.region_sequences[number];
  trailer.footer_pages = nvme::footer_pages(trailer.record_count);
  std::memcpy(at, &trailer, sizeof trailer);
  repair_footer(region);
}

void build(std::span<std::byte> region, Input input) {
  nvme::FooterTrailer trailer{};
  trailer.last_record_sequence = input.take<std::uint16_t>();
  const std::uint32_t max_records = static_cast<std::uint32_t>(region.size() / kPageBytes);
  std::vector<nvme::FooterEntry> entries;
  while (!input.empty() && entries.size() < max_records) {
    const auto form = input.take<std::uint8_t>();
    nvme::FooterEntry entry{};
    entry.key = key_of(input.take<std::uint8_t>());
    const std::uint32_t end = entries.empty() ? 1 : entries.back().page + entries.back().pages;
    entry.page = (form & 1) == 0 ? end + (form >> 6) : input.take<std::uint32_t>();
    entry.pages = (form & 2) == 0 ? nvme::kMinRecordPages + ((form >> 4) & 3) : input.take<std::uint32_t>();
    entries.push_back(entry);
  }
  trailer.record_count = static_cast<std::uint32_t>(entries.size());
  std::byte* const end = region.data() + region.size();
  std::memcpy(end - sizeof trailer, &trailer, sizeof trailer);
  if (!entries.empty()) {
    std::memcpy(end - nvme::footer_pages(entries.size()) * kPageBytes, entries.data(), entries.size() * sizeof(nvme::FooterEntry));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  const MadeStore& store = (flags & 8) != 0 ? large_store() : small_store();
  const std::uint32_t number = (flags & 16) != 0 ? 1 : 0;
  const std::size_t region_bytes = store.region_pages * kPageBytes;
  StoreFiles files = store.files;
  if ((flags & 32) == 0) files.has_checkpoint = false;
  const std::span<std::byte> region = std::span(files.data).subspan(number * region_bytes, region_bytes);
  if ((flags & 4) != 0) {
    build(region, input);
    make_identity_fit(store, region, number);
  } else {
    // Not longer than the footer that was there: records are not the matter here.
    nvme::FooterTrailer made;
    std::memcpy(&made, region.data() + region.size() - sizeof made, sizeof made);
    Bytes bytes = input.rest();
    bytes.resize(std::min<std::size_t>(bytes.size(), made.footer_pages * kPageBytes));
    std::copy(bytes.begin(), bytes.end(), region.end() - static_cast<std::ptrdiff_t>(bytes.size()));
    if ((flags & 2) != 0) {
      make_identity_fit(store, region, number);
    } else if ((flags & 1) != 0) {
      repair_footer(region);
    }
  }
  open_and_check(store, files, {.only_what_was_written = (flags & 7) == 0, .payloads_as_written = true});
  return 0;
}
