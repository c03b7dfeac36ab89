// XXH3-64 with seed 0 and the default secret (xxHash 0.8), for one block of threads: bit for bit what XXH3_64bits() gives.
//
// Inputs over 240 bytes are blocks of 1024 bytes, each 16 stripes of 64. Within a block all 8 lanes of all stripes are sums that do
// not depend on each other; only the step from block to block ("scramble") is a chain, of 8 independent lanes. So threads add up
// many blocks at once, and 8 threads walk the chain, two words per lane and block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.cuh"

namespace lmcn::xxh3 {

inline constexpr std::uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
inline constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                               kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

inline constexpr unsigned kLanes = 8, kStripesPerBlock = 16;
inline constexpr std::uint64_t kStripeBytes = 64, kBlockBytes = kStripesPerBlock * kStripeBytes;
inline constexpr std::uint64_t kLongestShortBytes = 240;

/// The default secret as little-endian words.
inline constexpr unsigned kSecretWords = 24;
__constant__ const std::uint64_t kSecret[kSecretWords] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072, 0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82,
    0x8E2443F7744608B8, 0x4C263A81E69035E0, 0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8, 0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5,
    0x49DAF0B751DD0D17, 0x9E68D429265516D3, 0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
};

/// What the lanes begin with.
__constant__ const std::uint64_t kInitialSums[kLanes] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                                         kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

/// 8 bytes of the secret that begin at any byte.
__device__ __forceinline__ std::uint64_t secret_at(unsigned byte) {
  const unsigned word = byte / 8, shift = byte % 8 * 8;
  return shift == 0 ? kSecret[word] : kSecret[word] >> shift | kSecret[word + 1] << (64 - shift);
}

/// Little-endian, at any address.
template <unsigned kBytes>
__device__ __forceinline__ std::uint64_t read(const std::byte* from) {
  std::uint64_t value = 0;
  for (unsigned i = 0; i < kBytes; ++i) value |= static_cast<std::uint64_t>(load(from + i)) << (8 * i);
  return value;
}

__device__ __forceinline__ std::uint64_t fold_product(std::uint64_t a, std::uint64_t b) {
#if defined(__CUDA_ARCH__)
  return a * b ^ __umul64hi(a, b);
#else
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
#endif
}
__device__ __forceinline__ std::uint64_t rotate_left(std::uint64_t value, unsigned bits) {
  return value << bits | value >> (64 - bits);
}
__device__ __forceinline__ std::uint64_t swap_bytes(std::uint64_t value) {
  std::uint64_t swapped = 0;
  for (unsigned i = 0; i < 8; ++i) swapped = swapped << 8 | (value >> (8 * i) & 0xFF);
  return swapped;
}

__device__ __forceinline__ std::uint64_t avalanche(std::uint64_t hash) {
  hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
  return hash ^ hash >> 32;
}
__device__ __forceinline__ std::uint64_t avalanche_of_xxh64(std::uint64_t hash) {
  hash = (hash ^ hash >> 33) * kPrime64_2;
  hash = (hash ^ hash >> 29) * kPrime64_3;
  return hash ^ hash >> 32;
}
__device__ __forceinline__ std::uint64_t mix_16_bytes(const std::byte* from, unsigned secret_byte) {
  return fold_product(read<8>(from) ^ secret_at(secret_byte), read<8>(from + 8) ^ secret_at(secret_byte + 8));
}

/// Up to 240 bytes, by one thread.
__device__ inline std::uint64_t hash_short(const std::byte* data, unsigned bytes) {
  if (bytes == 0) return avalanche_of_xxh64(secret_at(56) ^ secret_at(64));
  if (bytes <= 3) {
    const std::uint64_t combined = read<1>(data) << 16 | read<1>(data + bytes / 2) << 24 | read<1>(data + bytes - 1) | bytes << 8;
    return avalanche_of_xxh64(combined ^ ((secret_at(0) ^ secret_at(4)) & 0xFFFFFFFF));
  }
  if (bytes <= 8) {
    std::uint64_t hash = (read<4>(data + bytes - 4) + (read<4>(data) << 32)) ^ secret_at(8) ^ secret_at(16);
    hash = (hash ^ rotate_left(hash, 49) ^ rotate_left(hash, 24)) * 0x9FB21C651E98DF25;
    hash = (hash ^ ((hash >> 35) + bytes)) * 0x9FB21C651E98DF25;
    return hash ^ hash >> 28;
  }
  if (bytes <= 16) {
    const std::uint64_t low = read<8>(data) ^ secret_at(24) ^ secret_at(32);
    const std::uint64_t high = read<8>(data + bytes - 8) ^ secret_at(40) ^ secret_at(48);
    return avalanche(bytes + swap_bytes(low) + high + fold_product(low, high));
  }
  std::uint64_t hash = bytes * kPrime64_1;
  if (bytes <= 128) {
    // Pairs from both ends inwards: 1 to 4 of them.
    for (unsigned i = 0; i <= (bytes - 1) / 32; ++i) {
      hash += mix_16_bytes(data + 16 * i, 32 * i) + mix_16_bytes(data + bytes - 16 * (i + 1), 32 * i + 16);
    }
    return avalanche(hash);
  }
  for (unsigned i = 0; i < 8; ++i) hash += mix_16_bytes(data + 16 * i, 16 * i);
  hash = avalanche(hash);
  for (unsigned i = 8; i < bytes / 16; ++i) hash += mix_16_bytes(data + 16 * i, 16 * (i - 8) + 3);
  return avalanche(hash + mix_16_bytes(data + bytes - 16, 136 - 17));
}

/// What one lane adds for its 8 bytes. The bytes themselves are added to the neighbour, lane ^ 1.
__device__ __forceinline__ std::uint64_t product_of(std::uint64_t value, std::uint64_t key) {
  const std::uint64_t keyed = value ^ key;
  return (keyed & 0xFFFFFFFF) * (keyed >> 32);
}
__device__ __forceinline__ std::uint64_t scramble(std::uint64_t sum, unsigned lane) {
  return (sum ^ sum >> 47 ^ kSecret[16 + lane]) * kPrime32_1;
}
/// `sums`: of all lanes, at the end.
__device__ inline std::uint64_t merge(const std::uint64_t* sums, std::uint64_t bytes) {
  std::uint64_t hash = bytes * kPrime64_1;
  for (unsigned i = 0; i < kLanes / 2; ++i) {
    hash += fold_product(sums[2 * i] ^ secret_at(11 + 16 * i), sums[2 * i + 1] ^ secret_at(11 + 16 * i + 8));
  }
  return avalanche(hash);
}

}  // namespace lmcn::xxh3
