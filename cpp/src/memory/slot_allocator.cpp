#include "memory/slot_allocator.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <set>
#include <utility>

namespace lmcn {
namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kBucketBytes = 2ull << 20;
constexpr std::size_t kExactClasses = 16;
constexpr std::uint32_t kNone = ~0u;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Eight classes an octave: <= 1/8 above what was asked for.
std::uint64_t rounded_class(std::uint64_t bytes) {
  const auto octave = static_cast<int>(std::bit_width(bytes)) - 1;
  return round_up(bytes, std::max(kPage, octave > 3 ? std::uint64_t{1} << (octave - 3) : kPage));
}

struct Place {
  std::uint32_t generation = 0;  // 0: free
  std::uint32_t next_free = kNone;
};

// A stretch of the arena: free, or a slab. Extents tile the arena; a slab is exactly as long as its places, so nothing is lost
// inside it, and a free extent has no free neighbour.
struct Extent {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint32_t previous = kNone, next = kNone;  // by address
  std::uint32_t size_class = kNone;              // kNone: free
  std::uint32_t used = 0;                        // places in use
  std::uint32_t first_free = kNone;
  std::uint32_t partial_previous = kNone, partial_next = kNone;  // slabs of the class with a free place
  std::vector<Place> places;
};

struct SizeClass {
  std::uint64_t bytes = 0;
  std::uint32_t slabs = 0;
  std::uint32_t partial = kNone;  // first slab with a free place
};

}  // namespace

struct SlotAllocator::Impl {
  explicit Impl(std::uint64_t bytes)
      : arena_bytes(bytes / kPage * kPage),
        // Small slabs come back to the pool soon when sizes change.
        slab_target(std::clamp(arena_bytes / 64 / kPage * kPage, kPage, kBucketBytes)) {
    if (arena_bytes == 0) return;
    bucket.assign(static_cast<std::size_t>((arena_bytes + kBucketBytes - 1) / kBucketBytes), 0);
    extents.emplace_back().end = arena_bytes;
    insert_free(0);
  }

  std::optional<Slot> allocate(std::uint64_t bytes) {
    if (bytes == 0 || bytes > arena_bytes) return std::nullopt;
    const std::uint64_t wanted = class_bytes(bytes);
    std::uint32_t index = find_class(wanted);
    if (index == kNone || classes[index].partial == kNone) {
      if (!has_room(wanted)) return std::nullopt;
      if (index == kNone) index = add_class(wanted);
      add_slab(index);
    }
    return take_place(classes[index].partial);
  }

  Slot take_place(std::uint32_t id) {
    Extent& slab = extents[id];
    const std::uint64_t bytes = classes[slab.size_class].bytes;
    const std::uint32_t at = slab.first_free;
    Place& place = slab.places[at];
    slab.first_free = place.next_free;
    if (++generation == 0) ++generation;
    place = {generation, kNone};
    ++slab.used;
    if (slab.first_free == kNone) unlink_partial(id);
    used_bytes += bytes;
    ++used_slots;
    return {slab.begin + at * bytes, bytes, place.generation};
  }

  // Whether `slot` is one that is handed out now; its slab and place then.
  bool find(const Slot& slot, std::uint32_t& id, std::uint32_t& at) const {
    if (slot.generation == 0 || slot.offset >= arena_bytes) return false;
    id = bucket[static_cast<std::size_t>(slot.offset / kBucketBytes)];
    while (slot.offset >= extents[id].end) id = extents[id].next;
    const Extent& slab = extents[id];
    if (slab.size_class == kNone || classes[slab.size_class].bytes != slot.bytes) return false;
    if ((slot.offset - slab.begin) % slot.bytes != 0) return false;
    at = static_cast<std::uint32_t>((slot.offset - slab.begin) / slot.bytes);
    return slab.places[at].generation == slot.generation;
  }

  bool release(const Slot& slot) {
    std::uint32_t id = kNone;
    std::uint32_t at = 0;
    if (!find(slot, id, at)) return false;
    Extent& slab = extents[id];
    if (slab.first_free == kNone) link_partial(id);
    slab.places[at] = {0, slab.first_free};
    slab.first_free = at;
    --slab.used;
    used_bytes -= slot.bytes;
    --used_slots;
    if (slab.used == 0) remove_slab(id);
    return true;
  }

  // Classes. An exact one without slabs gives its place to the next size that comes.

  std::uint32_t find_class(std::uint64_t bytes) const {
    for (std::uint32_t i = 0; i < classes.size(); ++i) {
      if (classes[i].bytes == bytes) return i;
    }
    return kNone;
  }

  std::uint64_t class_bytes(std::uint64_t bytes) const {
    const std::uint64_t exact = round_up(std::max(bytes, kPage), kPage);
    if (find_class(exact) != kNone || reusable_class() != kNone || classes.size() < kExactClasses) return exact;
    return std::min(rounded_class(exact), arena_bytes);
  }

  std::uint32_t reusable_class() const {
    for (std::uint32_t i = 0; i < std::min(classes.size(), kExactClasses); ++i) {
      if (classes[i].slabs == 0) return i;
    }
    return kNone;
  }

  std::uint32_t add_class(std::uint64_t bytes) {
    if (const std::uint32_t reused = reusable_class(); reused != kNone && classes.size() >= kExactClasses) {
      classes[reused] = {.bytes = bytes};
      return reused;
    }
    for (auto i = static_cast<std::uint32_t>(kExactClasses); i < classes.size(); ++i) {
      if (classes[i].slabs == 0) {
        classes[i] = {.bytes = bytes};
        return i;
      }
    }
    classes.push_back({.bytes = bytes});
    return static_cast<std::uint32_t>(classes.size() - 1);
  }

  // Slabs.

  bool has_room(std::uint64_t bytes) const { return !free_by_size.empty() && free_by_size.rbegin()->first >= bytes; }

  // REQUIRES: has_room(class bytes)
  void add_slab(std::uint32_t index) {
    SizeClass& size_class = classes[index];
    // Large slots: four to a slab, so that most of their traffic stays inside slabs.
    const std::uint64_t target = std::max(slab_target, std::min(4 * size_class.bytes, arena_bytes / 64));
    std::uint64_t count = std::max<std::uint64_t>(1, target / size_class.bytes);
    auto from = free_by_size.lower_bound({count * size_class.bytes, 0});
    if (from == free_by_size.end()) {
      from = std::prev(from);  // the largest
      count = from->first / size_class.bytes;
    }
    const std::uint32_t id = carve(from->second, count * size_class.bytes);
    Extent& slab = extents[id];
    slab.size_class = index;
    slab.used = 0;
    slab.first_free = 0;
    slab.places.resize(static_cast<std::size_t>(count));
    for (std::uint32_t i = 0; i < count; ++i) slab.places[i] = {0, i + 1 < count ? i + 1 : kNone};
    ++size_class.slabs;
    slab_bytes += slab.end - slab.begin;
    link_partial(id);
  }

  void remove_slab(std::uint32_t id) {
    unlink_partial(id);
    Extent& slab = extents[id];
    --classes[slab.size_class].slabs;
    slab.size_class = kNone;
    slab.places.clear();
    slab_bytes -= slab.end - slab.begin;
    if (const std::uint32_t left = slab.previous; is_free(left)) {
      erase_free(left);
      id = merge(left, id);
    }
    if (const std::uint32_t right = extents[id].next; is_free(right)) {
      erase_free(right);
      id = merge(id, right);
    }
    insert_free(id);
  }

  void link_partial(std::uint32_t id) {
    std::uint32_t& head = classes[extents[id].size_class].partial;
    extents[id].partial_previous = kNone;
    extents[id].partial_next = head;
    if (head != kNone) extents[head].partial_previous = id;
    head = id;
  }

  void unlink_partial(std::uint32_t id) {
    const Extent& slab = extents[id];
    std::uint32_t& head = classes[slab.size_class].partial;
    (slab.partial_previous == kNone ? head : extents[slab.partial_previous].partial_next) = slab.partial_next;
    if (slab.partial_next != kNone) extents[slab.partial_next].partial_previous = slab.partial_previous;
  }

  // Extents.

  bool is_free(std::uint32_t id) const { return id != kNone && extents[id].size_class == kNone; }

  void insert_free(std::uint32_t id) {
    const std::uint64_t bytes = extents[id].end - extents[id].begin;
    free_by_size.emplace(bytes, id);
    free_slabs += bytes / slab_target;
  }

  void erase_free(std::uint32_t id) {
    const std::uint64_t bytes = extents[id].end - extents[id].begin;
    free_by_size.erase({bytes, id});
    free_slabs -= bytes / slab_target;
  }

  // bucket[i] is the extent that covers byte i * kBucketBytes.
  void point_buckets(std::uint32_t of, std::uint32_t to) {
    for (std::uint64_t i = (extents[of].begin + kBucketBytes - 1) / kBucketBytes; i * kBucketBytes < extents[of].end; ++i) {
      bucket[static_cast<std::size_t>(i)] = to;
    }
  }

  // Takes a free extent out of the pool, cuts `bytes` off its front; the rest stays free under its old id.
  std::uint32_t carve(std::uint32_t from, std::uint64_t bytes) {
    erase_free(from);
    if (extents[from].end - extents[from].begin == bytes) return from;
    const std::uint32_t id = new_extent();
    Extent& rest = extents[from];
    Extent& cut = extents[id];
    cut.begin = rest.begin;
    cut.end = rest.begin += bytes;
    cut.previous = rest.previous;
    cut.next = from;
    if (cut.previous != kNone) extents[cut.previous].next = id;
    rest.previous = id;
    point_buckets(id, id);
    insert_free(from);
    return id;
  }

  // Two neighbours, left one first, neither in the pool, become one; the longer keeps its id (fewer buckets to point anew).
  std::uint32_t merge(std::uint32_t left, std::uint32_t right) {
    const bool keep_left = extents[left].end - extents[left].begin >= extents[right].end - extents[right].begin;
    const std::uint32_t kept = keep_left ? left : right;
    const std::uint32_t gone = keep_left ? right : left;
    point_buckets(gone, kept);
    const std::uint32_t before = extents[left].previous;
    const std::uint32_t after = extents[right].next;
    extents[kept].begin = extents[left].begin;
    extents[kept].end = extents[right].end;
    extents[kept].previous = before;
    extents[kept].next = after;
    if (before != kNone) extents[before].next = kept;
    if (after != kNone) extents[after].previous = kept;
    unused.push_back(gone);
    return kept;
  }

  std::uint32_t new_extent() {
    if (!unused.empty()) {
      const std::uint32_t id = unused.back();
      unused.pop_back();
      return id;
    }
    extents.emplace_back();
    return static_cast<std::uint32_t>(extents.size() - 1);
  }

  const std::uint64_t arena_bytes;
  const std::uint64_t slab_target;
  std::vector<Extent> extents;
  std::vector<std::uint32_t> unused;                               // ids in `extents` that are not part of the arena now
  std::vector<std::uint32_t> bucket;                               // where to begin to look for the extent of an offset
  std::set<std::pair<std::uint64_t, std::uint32_t>> free_by_size;  // (bytes, id)
  std::vector<SizeClass> classes;                                  // the first kExactClasses: exact; then rounded ones
  std::uint32_t generation = 0;  // of all places together, so that no two lives of overlapping places share one
  std::uint64_t used_bytes = 0, used_slots = 0, slab_bytes = 0, free_slabs = 0, bad_releases = 0;
};

SlotAllocator::SlotAllocator(std::uint64_t arena_bytes) : impl_(std::make_unique<Impl>(arena_bytes)) {}
SlotAllocator::~SlotAllocator() = default;

std::optional<Slot> SlotAllocator::allocate(std::uint64_t bytes) {
  return impl_->allocate(bytes);
}

void SlotAllocator::release(const Slot& slot) {
  if (impl_->release(slot)) return;
  ++impl_->bad_releases;
  assert(!"SlotAllocator::release: not a slot that is handed out");
}

SlotAllocator::Stats SlotAllocator::stats() const {
  return {.arena_bytes = impl_->arena_bytes,
          .used_bytes = impl_->used_bytes,
          .used_slots = impl_->used_slots,
          .slab_bytes = impl_->slab_bytes,
          .free_slabs = impl_->free_slabs,
          .bad_releases = impl_->bad_releases};
}

std::uint64_t SlotAllocator::class_bytes(std::uint64_t bytes) const {
  return impl_->class_bytes(bytes);
}

}  // namespace lmcn
