#include "index/chunk_index.hpp"

#include <cassert>
#include <optional>
#include <utility>

#include "index/entry_pool.hpp"
#include "index/id_table.hpp"

namespace lmcn {
namespace {

std::uint32_t hash_of(const ChunkKey& key) noexcept {
  return static_cast<std::uint32_t>(key.prefix64() >> 32);
}

}  // namespace

// Growth is spread: a full table becomes `old`, and each insert or erase moves a few of its slots to the new one.
// Invariant: a live id is in exactly one slot of table or old; new ids go to table. The new table takes 7/8 of the old slots
// more before it is full, and each of these inserts moves kMoveSlots >= 8/7, so old is empty before table is full.
struct ChunkIndex::Impl {
  static constexpr std::size_t kMoveSlots = 16;

  EntryPool pool;
  IdTable table{IdTable::kMinLog2Slots};
  std::optional<IdTable> old;

  auto has_key(const ChunkKey& key) const noexcept {
    return [this, &key](EntryId id) { return pool[id].key == key; };
  }

  EntryId find(const ChunkKey& key, std::uint32_t hash) const noexcept {
    if (const auto at = table.find(hash, has_key(key)); at != IdTable::kNotFound) return table.id_at(at);
    if (old && old->may_hold(hash)) {
      if (const auto at = old->find(hash, has_key(key)); at != IdTable::kNotFound) return old->id_at(at);
    }
    return kNoEntry;
  }

  void move_a_step() noexcept {
    if (!old) return;
    old->move_to(table, kMoveSlots);
    if (old->size() == 0) old.reset();
  }

  void grow_if_full() {
    if (!table.full() || old) return;
    IdTable larger(table.log2_slots() + 1);
    old.emplace(std::exchange(table, std::move(larger)));
  }
};

ChunkIndex::ChunkIndex() : impl_(std::make_unique<Impl>()) {}
ChunkIndex::~ChunkIndex() = default;

EntryId ChunkIndex::find(const ChunkKey& key) const noexcept {
  return impl_->find(key, hash_of(key));
}

EntryId ChunkIndex::insert(const ChunkKey& key) {
  const std::uint32_t hash = hash_of(key);
  if (const EntryId present = impl_->find(key, hash); present != kNoEntry) return present;
  impl_->move_a_step();
  impl_->grow_if_full();
  const EntryId id = impl_->pool.allocate();
  impl_->pool[id].key = key;
  impl_->table.insert(hash, id);
  return id;
}

void ChunkIndex::erase(EntryId id) {
  assert(live(id));
  const auto is_id = [id](EntryId other) { return other == id; };
  const std::uint32_t hash = hash_of(impl_->pool[id].key);
  if (const auto at = impl_->table.find(hash, is_id); at != IdTable::kNotFound) {
    impl_->table.erase_at(at);
  } else {
    impl_->old->erase_at(impl_->old->find(hash, is_id));
  }
  impl_->pool.free(id);
  impl_->move_a_step();
}

Entry& ChunkIndex::entry(EntryId id) noexcept {
  assert(live(id));
  return impl_->pool[id];
}

const Entry& ChunkIndex::entry(EntryId id) const noexcept {
  assert(live(id));
  return impl_->pool[id];
}

bool ChunkIndex::live(EntryId id) const noexcept {
  return impl_->pool.live(id);
}
std::uint64_t ChunkIndex::size() const noexcept {
  return impl_->pool.size();
}

std::uint64_t ChunkIndex::memory_bytes() const noexcept {
  return sizeof(Impl) + impl_->pool.memory_bytes() + impl_->table.memory_bytes() + (impl_->old ? impl_->old->memory_bytes() : 0);
}

void ChunkIndex::clear() {
  *impl_ = Impl{};
}

EntryId ChunkIndex::end_id() const noexcept {
  return impl_->pool.end();
}

void ChunkIndex::for_each(const std::function<void(EntryId, Entry&)>& f) {
  for (EntryId id = 0; id < impl_->pool.end(); ++id) {
    if (impl_->pool.live(id)) f(id, impl_->pool[id]);
  }
}

void ChunkIndex::prefetch(const ChunkKey& key) const noexcept {
  const std::uint32_t hash = hash_of(key);
  impl_->table.prefetch(hash);
  if (impl_->old) impl_->old->prefetch(hash);
}

}  // namespace lmcn
