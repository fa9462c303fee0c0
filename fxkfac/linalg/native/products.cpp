// Products of blocks of digits, as tiles take them: of digits a, b, c and a', b', c' with sizes of
// 2^16, 2^8 and 1, that of c and c' alone is left out: less than what the largest are rounded by.

#if defined(HAS_DIGITS)

namespace digits {
namespace {

constexpr int HALF = WIDTH / 2 * WIDTH;  // sums
constexpr int VECTORS = HALF / SIDE;

// What a tile has, for all eight of them.
struct alignas(LINE) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};
constexpr Shape SHAPE{};  // in memory before anything runs, as compilers do not see all of it read

// 32 x 32 sums.
struct alignas(LINE) Square {
  float sums[WIDTH * WIDTH];

  void add(const Square& other) {
    for (int i = 0; i < WIDTH * WIDTH; i += SIDE)
      _mm512_store_ps(sums + i, _mm512_load_ps(sums + i) + _mm512_load_ps(other.sums + i));
  }
};

// Sums for 16 columns and 32 others, of larger products and of those 2^8 times smaller.
struct Levels {
  alignas(LINE) int32_t larger[2][SIDE * SIDE], smaller[2][SIDE * SIDE];

  // A vector of both.
  __m512 read(int n) const {
    const auto from = [&](const int32_t(&tiles)[2][SIDE * SIDE]) {
      return _mm512_cvtepi32_ps(_mm512_load_si512(tiles[n % 2] + n / 2 * SIDE));
    };
    return _mm512_fmadd_ps(from(larger), _mm512_set1_ps(1 << 8), from(smaller));
  }
};

// What becomes of small products: they wait for large ones.
struct Wait {
  const Levels& small;
  float* to;

  void vector(int n) const { _mm512_store_ps(to + n * SIDE, small.read(n)); }
};

// What becomes of both: they are scaled, and added to sums if there are some.
struct Add {
  const Levels* large;
  const float *small, *down, *across;
  float* to;
  bool adds;

  void vector(int n) const {
    const __m512 both = _mm512_fmadd_ps(large->read(n), _mm512_set1_ps(1 << 16),
                                        _mm512_load_ps(small + n * SIDE));
    const __m512 half = both * _mm512_set1_ps(down[n / 2] * (1 << 8));  // both scales may vanish
    const __m512 other = _mm512_load_ps(across + n % 2 * SIDE);
    float* sum = to + n * SIDE;
    _mm512_store_ps(sum, adds ? _mm512_fmadd_ps(half, other, _mm512_load_ps(sum)) : half * other);
  }
};

#define LEFT(tile, digit) _tile_loadd(tile, left + (digit) * TILE, LINE);
#define RIGHT(tile, digit, half) _tile_loadd(tile, right + (2 * digit + half) * TILE, LINE);
#define MULTIPLY(sum, left_tile, right_tile) _tile_dpbssd(sum, left_tile, right_tile);
#define MEANWHILE(n) if (meanwhile) meanwhile->vector(n), meanwhile->vector(n + 1);

// Those of a piece; vectors of earlier ones come on while tiles are at work. A sum waits for the
// product before, which takes three times as long as the next may follow: so others come between.
struct Small {
  template <class Other>
  static void piece(const char* left, const char* right, const Other* meanwhile, int n) {
    LEFT(4, 0) RIGHT(6, 2, 0) MULTIPLY(0, 4, 6)
    RIGHT(7, 2, 1) MULTIPLY(1, 4, 7) MEANWHILE(n)
    LEFT(5, 1) MULTIPLY(2, 5, 6)
    RIGHT(6, 1, 0) MULTIPLY(0, 5, 6) MEANWHILE(n + 2)
    MULTIPLY(3, 5, 7)
    RIGHT(7, 1, 1) MULTIPLY(1, 5, 7) MEANWHILE(n + 4)
    LEFT(4, 2) MULTIPLY(2, 4, 6)
    RIGHT(6, 0, 0) MULTIPLY(0, 4, 6) MEANWHILE(n + 6)
    RIGHT(6, 0, 1) MULTIPLY(1, 4, 6)
    MULTIPLY(3, 4, 7)
  }
};

struct Large {
  template <class Other>
  static void piece(const char* left, const char* right, const Other* meanwhile, int n) {
    LEFT(4, 0) RIGHT(6, 0, 0) MULTIPLY(0, 4, 6)
    RIGHT(7, 1, 0) MULTIPLY(2, 4, 7) MEANWHILE(n)
    RIGHT(7, 1, 1) MULTIPLY(3, 4, 7) MEANWHILE(n + 2)
    RIGHT(7, 0, 1) MULTIPLY(1, 4, 7) MEANWHILE(n + 4)
    LEFT(5, 1) MULTIPLY(2, 5, 6) MEANWHILE(n + 6)
    MULTIPLY(3, 5, 7)
  }
};

template <class Those, class Other>
void multiply(const char* left, const char* right, int pieces, Levels& to, const Other* meanwhile) {
  constexpr int EACH = VECTORS / PIECES;
  asm volatile("" ::: "memory");  // compilers do not see that tiles read it
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < pieces; ++k, left += PIECE / 2, right += PIECE)
    Those::piece(left, right, meanwhile, k * EACH);
  for (int n = pieces * EACH; meanwhile && n < VECTORS; ++n) meanwhile->vector(n);
  _tile_stored(0, to.larger[0], LINE);
  _tile_stored(1, to.larger[1], LINE);
  _tile_stored(2, to.smaller[0], LINE);
  _tile_stored(3, to.smaller[1], LINE);
}

// A block with columns along lines, as tiles take what is on the left: 16 columns, and 16 more.
void turn(const Block& from, int pieces, Block& to) {
  for (int k = 0; k < pieces; ++k)
    for (int n = 0; n < 2 * DIGITS; ++n) {
      const int piece = k + n % 2 * PIECES;
      transpose(from.pieces + k * PIECE + n * TILE, LINE,
                to.pieces + piece * PIECE / 2 + n / 2 * TILE, LINE);
    }
  std::copy_n(from.scales, WIDTH, to.scales);
}

// Products one after the other; sums are there when the next one has been taken.
class Products {
 public:
  // Of so many pieces of a block that is turned and another.
  void add(const Block& left, const Block& right, int pieces, Square& square, bool adds) {
    for (int half = 0; half < 2; ++half)
      add(left, half, right, pieces, square.sums + half * HALF, adds);
  }

  void finish() {
    for (int n = 0; last.to && n < VECTORS; ++n) last.vector(n);
    last.to = nullptr;
  }

 private:
  void add(const Block& left, int half, const Block& right, int pieces, float* sums, bool adds) {
    const char* from = left.pieces + half * PIECES * PIECE / 2;
    multiply<Small>(from, right.pieces, pieces, small, last.to ? &last : nullptr);
    const Wait wait{small, waiting};
    multiply<Large>(from, right.pieces, pieces, large, &wait);
    last = {&large, waiting, left.scales + half * SIDE, right.scales, sums, adds};
  }

  Levels small, large;
  alignas(LINE) float waiting[HALF];
  Add last{};
};

}  // namespace
}  // namespace digits

#endif
