// Vectors of the processor, and panels: columns of x, a few vectors wide, with its rows together.

namespace vectors {
namespace {

// Of a vector, and how many rows of a tile are in registers at once: there are 32, or 16 for AVX.
#if defined(__AVX512F__)
constexpr int BYTES = 64, DOWN = 8;
#elif defined(__AVX__)
constexpr int BYTES = 32, DOWN = 4;
#else
constexpr int BYTES = 16, DOWN = 6;
#endif
constexpr int ACROSS = 3;    // vectors: the width of a panel
constexpr int64_t FEW = 32;  // rows

template <class T>
using Vector [[gnu::vector_size(BYTES)]] = T;
template <class T>
constexpr int LANES = BYTES / sizeof(T);
template <class T>
constexpr int WIDTH = ACROSS * LANES<T>;
template <class T>
using Square = Vector<T>[LANES<T>];

// Wherever it is.
template <class T>
Vector<T> read(const T* from) {
  Vector<T> found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}

template <class T, class V>
void write(const V& vector, T* to) {
  static_assert(sizeof(V) == sizeof(Vector<T>));
  std::memcpy(to, &vector, sizeof(vector));
}

// Entries of two vectors by turns, from their first or their second half.
template <class T, bool SECOND, size_t... K>
Vector<T> by_turns(Vector<T> a, Vector<T> b, std::index_sequence<K...>) {
  constexpr auto place = [](size_t k) { return SECOND * LANES<T> / 2 + k / 2 + k % 2 * LANES<T>; };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(place(K))...);
#else
  using Places = decltype(a < b);
  return __builtin_shuffle(a, b, Places{std::decay_t<decltype(Places{}[0])>(place(K))...});
#endif
}

template <class T>
void transpose(Square<T>& square) {
  constexpr auto lanes = std::make_index_sequence<LANES<T>>();
  constexpr int half = LANES<T> / 2;
#pragma GCC unroll 4
  for (int n = LANES<T>; n > 1; n /= 2) {
    Square<T> next;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      next[2 * i] = by_turns<T, false>(square[i], square[i + half], lanes);
      next[2 * i + 1] = by_turns<T, true>(square[i], square[i + half], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i) square[i] = next[i];
  }
}

// The same between rows that are so many entries apart.
template <class T>
void transpose(const T* from, int64_t from_step, T* to, int64_t to_step) {
  Square<T> square;
  for (int i = 0; i < LANES<T>; ++i) square[i] = read(from + i * from_step);
  transpose<T>(square);
  for (int i = 0; i < LANES<T>; ++i) write(square[i], to + i * to_step);
}

template <class T>
int64_t panels_in(int64_t d) {
  return (d + WIDTH<T> - 1) / WIDTH<T>;
}

// Some columns of as many rows as a vector has entries, which follow one another in memory.
template <class T>
void turn(const T* start, const int64_t* columns, int number, T* panel) {
  for (int j = 0; j < WIDTH<T>; j += LANES<T>) {
    Square<T> square;
    for (int i = 0; i < LANES<T>; ++i)
      square[i] = j + i < number ? read(start + columns[j + i]) : Vector<T>{};
    transpose<T>(square);
    for (int i = 0; i < LANES<T>; ++i) write(square[i], panel + i * WIDTH<T> + j);
  }
}

// Some rows of some columns, no more than a panel has, and zeros for the others.
template <class T>
void copy(const Rows<T>& x, int64_t first, int64_t number, int64_t column, int n, T* panel) {
  const int64_t* columns = x.columns + column;
  const bool together = adjacent(columns, n);
  const int whole = together ? n / LANES<T> * LANES<T> : 0;
  for (int64_t k = 0, step; k < number; k += step, panel += step * WIDTH<T>) {
    const int64_t* row = x.rows + first + k;
    if (!together && number - k >= LANES<T> && adjacent(row, LANES<T>)) {
      turn(x.x + *row, columns, n, panel);
      step = LANES<T>;
      continue;
    }
    const T* from = x.x + *row;
    for (int j = 0; j < whole; j += LANES<T>) write(read(from + columns[j]), panel + j);
    for (int j = whole; j < n; ++j) panel[j] = from[columns[j]];
    std::fill(panel + n, panel + WIDTH<T>, T(0));
    step = 1;
  }
}

// Sums of a panel's columns, or those added; of a few rows first, so that rounding does not add up.
template <class T>
void add_columns(const T* panel, int64_t number, bool adds, T* sums) {
  Vector<T> found[ACROSS]{};
  for (int64_t k = 0; k < number;) {
    Vector<T> few[ACROSS]{};
    for (const int64_t end = std::min(k + FEW, number); k < end; ++k, panel += WIDTH<T>)
      for (int j = 0; j < ACROSS; ++j) few[j] += read(panel + j * LANES<T>);
    for (int j = 0; j < ACROSS; ++j) found[j] += few[j];
  }
  for (int j = 0; j < ACROSS; ++j) {
    T* sum = sums + j * LANES<T>;
    write(adds ? read(sum) + found[j] : found[j], sum);
  }
}

// The product of two panels.
template <class T>
struct Tile {
  T sums[WIDTH<T> * WIDTH<T>];

  void add(const Tile& other) {
    for (int i = 0; i < WIDTH<T> * WIDTH<T>; i += LANES<T>)
      write(read(sums + i) + read(other.sums + i), sums + i);
  }

  // Of some of its rows and columns.
  void set_transpose(const Tile& other, int rows, int columns) {
    for (int i = 0; i < rows; i += LANES<T>)
      for (int j = 0; j < columns; j += LANES<T>)
        transpose(other.sums + i * WIDTH<T> + j, WIDTH<T>, sums + j * WIDTH<T> + i, WIDTH<T>);
  }

  // Put what is below the diagonal above it, too.
  void mirror(int rows) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < i; ++j) sums[j * WIDTH<T> + i] = sums[i * WIDTH<T> + j];
  }
};

// Rows that follow one another.
struct Piece {
  int64_t start, length;
};

struct Pieces {
  const Piece *begin, *end;
};

// A few rows of a tile: its first N vectors of each, or those added.
template <class T, int N>
void multiply(const T* left, const T* right, Pieces pieces, bool adds, T* tile) {
  Vector<T> sums[DOWN][N]{};
  for (const Piece* piece = pieces.begin; piece < pieces.end; ++piece) {
    const T *x = left + piece->start * WIDTH<T>, *z = right + piece->start * WIDTH<T>;
    for (int64_t k = 0; k < piece->length; ++k, x += WIDTH<T>, z += WIDTH<T>) {
      Vector<T> y[N];
#pragma GCC unroll 3
      for (int j = 0; j < N; ++j) y[j] = read(z + j * LANES<T>);
#pragma GCC unroll 8
      for (int i = 0; i < DOWN; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < N; ++j) sums[i][j] += x[i] * y[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < DOWN; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) {
      T* sum = tile + i * WIDTH<T> + j * LANES<T>;
      write(adds ? read(sum) + sums[i][j] : sums[i][j], sum);
    }
}

// How much of a tile is taken: on the diagonal what is below it, in whole vectors.
struct Part {
  int rows, columns;
  bool diagonal;

  template <class T>
  int vectors(int row) const {
    const int last = diagonal ? std::min(columns, row + DOWN) : columns;
    return (last + LANES<T> - 1) / LANES<T>;
  }
};

// Of some rows of two panels.
template <class T>
void product(const T* left, const T* right, Pieces rows, Part part, bool adds, Tile<T>& tile) {
  static_assert(WIDTH<T> % DOWN == 0);
  for (int i = 0; i < part.rows; i += DOWN) {
    const int vectors = part.vectors<T>(i);
    const auto few = vectors == 1 ? multiply<T, 1> : vectors == 2 ? multiply<T, 2> : multiply<T, 3>;
    few(left + i, right, rows, adds, tile.sums + i * WIDTH<T>);
  }
}

}  // namespace
}  // namespace vectors
