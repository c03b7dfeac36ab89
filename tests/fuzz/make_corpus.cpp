// usage: make_corpus DIRECTORY    Writes inputs for each target into DIRECTORY/<target>/, from what the real log and the real
// messages are. They are where fuzzing begins; what it adds is kept beside them.
#include <filesystem>
#include <fstream>
#include <iostream>

#include "attach/rendezvous_wire.hpp"
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

class Corpus {
 public:
  Corpus(std::filesystem::path root, const std::string& target) : folder_(std::move(root) / target) {
    std::filesystem::create_directories(folder_);
  }
  void add(const std::string& name, std::initializer_list<std::uint8_t> head, std::span<const std::byte> rest = {}) const {
    std::ofstream out(folder_ / ("made-" + name), std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char*>(std::data(head)), static_cast<std::streamsize>(head.size()));
    out.write(reinterpret_cast<const char*>(rest.data()), static_cast<std::streamsize>(rest.size()));
    require(out.good(), "cannot write into " + folder_.string());
  }

 private:
  std::filesystem::path folder_;
};

std::span<const std::byte> tail(const Bytes& data, std::size_t end, std::size_t bytes) {
  return std::span(data).subspan(end - bytes, bytes);
}

void make_superblock(const std::filesystem::path& root) {
  const Corpus corpus(root, "superblock");
  const Bytes& whole = small_store().files.superblock;
  corpus.add("whole", {0}, whole);
  corpus.add("fields", {1}, std::span(whole).first(56));
  corpus.add("cut", {0}, std::span(whole).first(100));
  corpus.add("no-data", {2}, whole);
}

void make_checkpoint(const std::filesystem::path& root) {
  const Corpus corpus(root, "checkpoint");
  const Bytes& whole = small_store().files.checkpoint;
  corpus.add("whole", {0}, whole);
  corpus.add("repaired", {1}, whole);
  corpus.add("identity", {2}, whole);
  corpus.add("cut", {0}, std::span(whole).first(whole.size() - 16));
  // Sealed and open regions with entries, short form: (form, key, page, pages).
  corpus.add("built", {4, 0, 4, 1, 13, 0, 7, 1, 1, 0, 0, 0, 0, 1, 4, 0, 1, 5, 3, 1, 2, 1, 3, 2, 3, 1, 4});
  corpus.add("built-over-the-end", {4, 0, 1, 1, 200, 0, 1, 1, 14});
  corpus.add("built-over-what-is-known", {4, 0, 1, 1, 8, 0, 1, 1, 12});
  corpus.add("built-overlapping", {4, 0, 1, 1, 13, 0, 1, 1, 4, 0, 2, 3, 4});
  corpus.add("built-sequences", {4, 3, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 2, 2, 1, 0, 9, 0, 5});
}

void make_footer(const std::filesystem::path& root) {
  const Corpus corpus(root, "footer");
  const MadeStore& small = small_store();
  const MadeStore& large = large_store();
  const std::size_t small_end = small.region_pages * kPageBytes;
  const std::size_t large_end = large.region_pages * kPageBytes;
  corpus.add("whole", {0}, tail(small.files.data, small_end, kPageBytes));
  corpus.add("trailer", {2}, tail(small.files.data, small_end, sizeof(nvme::FooterTrailer)));
  corpus.add("two-pages", {8}, tail(large.files.data, large_end, 2 * kPageBytes));
  corpus.add("two-pages-trailer", {8 | 2}, tail(large.files.data, large_end, sizeof(nvme::FooterTrailer)));
  corpus.add("with-checkpoint", {32 | 16}, tail(small.files.data, 2 * small_end, kPageBytes));
  corpus.add("built", {4, 1, 0, 0, 1, 0, 2, 16, 3});
  corpus.add("built-after-checkpoint", {4 | 16 | 32, 1, 0, 0, 1, 0, 2, 16, 3});
  corpus.add("built-over-the-end", {4, 1, 0, 2, 1, 20, 0, 0, 0});
  corpus.add("built-overlapping", {4, 1, 0, 0, 0, 1, 1, 2, 0, 0, 0});
  Bytes many;
  for (int i = 0; i < 120; ++i) many.insert(many.end(), {std::byte{0}, std::byte(i)});
  corpus.add("built-many", {4 | 8, 1, 0}, many);
}

void make_region(const std::filesystem::path& root) {
  const Corpus corpus(root, "region");
  corpus.add("untouched", {0});
  corpus.add("with-checkpoint", {2});
  corpus.add("large", {4});
  corpus.add("bytes", {0, 0, 0, 0, 40, 0, 1, 99});
  corpus.add("bytes-repaired", {1, 0, 33, 0, 80, 0, 2, 1, 2});
  corpus.add("region-header", {0, 1, 16, 0, 0, 0, 0});
  corpus.add("twice-one-sequence", {0, 1, 16, 0, 0, 0, 0, 1, 48, 0, 0, 1, 0});
  corpus.add("skip", {0, 2, 33, 0, 2, 4});
  corpus.add("slot", {0, 3, 33, 0, 2, 1, 0, 0, 1, 9, 0, 16});
  corpus.add("skip-over-the-end", {0, 2, 33, 0, 2, 40, 3, 73, 0, 2, 1, 0, 0, 1, 9, 0, 16});
  corpus.add("slot-over-the-end", {0, 3, 33, 0, 2, 1, 0, 0, 0, 9, 0, 0xF0});
  corpus.add("slot-of-another-region", {0, 3, 33, 0, 1, 1, 0, 0, 0, 9, 0, 16});
  corpus.add("copy", {0, 4, 36, 0, 33, 0});
}

void make_slot_header(const std::filesystem::path& root) {
  const Corpus corpus(root, "slot_header");
  const Bytes& data = small_store().files.data;
  const std::span<const std::byte> record = std::span(data).subspan(kPageBytes, 4 * kPageBytes);
  corpus.add("record", {0, 0, 0, 0, 0, 0}, record);
  corpus.add("laid-over", {4, 1, 5, 0, 0, 0});
  corpus.add("many-segments", {4 | 2, 39, 5, 0, 0, 0});
  corpus.add("header-alone", {1, 0, 0, 0, 0, 0}, record.first(kPageBytes));
  corpus.add("fields", {4 | 2, 2, 9, 0, 0, 0}, record.first(120));
}

void make_rendezvous(const std::filesystem::path& root) {
  const Corpus corpus(root, "rendezvous");
  wire::Hello hello;
  hello.rank_bytes = 4096;
  wire::Reply reply;
  reply.arena_bytes = 1 << 20;
  reply.rank_bytes = 4096;
  reply.rank_count = 2;
  const auto hello_bytes = std::as_bytes(std::span(&hello, 1));
  const auto reply_bytes = std::as_bytes(std::span(&reply, 1));
  corpus.add("hello", {0, 0}, hello_bytes);
  corpus.add("hello-to-owner", {2, 0}, hello_bytes);
  corpus.add("reply", {1, 1}, reply_bytes);
  corpus.add("reply-two-descriptors", {1, 2}, reply_bytes);
  corpus.add("reply-without", {1, 0}, reply_bytes);
  const wire::Reply refused = wire::refusal(Status(Code::kLocked, "rank 0 is attached already"));
  corpus.add("refusal", {1, 0}, std::as_bytes(std::span(&refused, 1)));
  corpus.add("empty", {2, 0});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_corpus DIRECTORY\n";
    return 2;
  }
  const std::filesystem::path root = argv[1];
  make_superblock(root);
  make_checkpoint(root);
  make_footer(root);
  make_region(root);
  make_slot_header(root);
  make_rendezvous(root);
  return 0;
}
