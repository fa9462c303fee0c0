// total = scale * sum of w w^T over the windows w of images, or that added, from images alone.
//
// Two taps of a window meet where the first one may lie: in boxes of positions, all of whose
// partners are as far away. Many taps share a box. So products come first, of channels at every
// position of a box with those at its partner, and windows are put together of these. Every thread
// takes some images, or some rows of a few large ones, with sums of its own; or, where channels are
// many or rows few, some pairs of panels, of all images.

namespace vectors {
namespace {

struct Span {
  int64_t begin, end;
};

// One part of so many.
struct Share {
  int64_t part, of;
};

template <class T>
class Moved {
 public:
  // A row for each position, and a column for each channel.
  Moved(const Plan& plan, const Rows<T>& x)
      : plan(plan),
        x(x),
        channels(x.d),
        panels(channels.panels),
        parts((x.number + plan.rows - 1) / plan.rows),
        size(plan.rows * WIDTH<T>),
        pairs(channels.pairs()) {}

  // Numbers.
  int64_t room(int threads) const {
    if (is_tall(threads)) return threads * room_for_pairs() + most_parts(threads) * panels * size;
    return threads * room_for_pair() + parts_together() * panels * size;
  }

  // The trace of the sum.
  T take(const Total<T>& total, T* room, int threads) const {
    const Windows<T> windows(plan, channels, total);
    return is_tall(threads) ? tall(windows, room, threads) : wide(windows, room, threads);
  }

 private:
  const Plan& plan;
  const Rows<T>& x;
  const Channels<T> channels;
  const int64_t panels, parts, size;  // of a panel: numbers
  const std::vector<Pair> pairs;

  int64_t room_for_pair() const { return plan.number * WIDTH<T> * WIDTH<T>; }

  int64_t room_for_pairs() const { return pairs.size() * room_for_pair(); }

  bool is_tall(int threads) const {
    const int64_t own = room_for_pairs() * sizeof(T);
    return x.number >= threads * DEPTH && own <= std::min(MOST, ALL / threads);
  }

  // That threads take some rows of.
  int64_t most_parts(int threads) const { return std::min<int64_t>(parts, threads); }

  // Of which all panels are there at once.
  int64_t parts_together() const {
    const int64_t sum = x.d * plan.taps * x.d * plan.taps, most = std::max(CHUNK, SUMS * sum);
    return std::clamp<int64_t>(most / (panels * size), 1, parts);
  }

  int64_t rows_in(int64_t part) const { return std::min(plan.rows, x.number - part * plan.rows); }

  void copy_panel(int64_t part, int64_t p, T* panel) const {
    copy(x, part * plan.rows, rows_in(part), p * channels.width, channels.in(p), panel);
  }

  // Products of two panels in every box, of positions in some rows, or those added: a few of all
  // boxes at a time. Of a panel with itself, half of the boxes: the others turned have the same.
  void multiply(Pair pair, const T* images, Span rows, bool adds, Tile<T>* tiles) const {
    const auto [p, q, _] = pair;
    const T *left = images + p * size, *right = images + q * size;
    std::vector<const Piece*> next(plan.number);
    for (int64_t b = 0; b < plan.number; ++b) next[b] = first_piece(plan.boxes[b], rows.begin);
    for (bool rest = true; rest; adds = true) {
      rest = false;
      for (int64_t b = 0; b < plan.number; ++b) {
        const Box& box = plan.boxes[b];
        if (p == q && box.turned < b) continue;
        const Pieces some = pieces(next[b], plan.pieces + box.end, rows.end);
        if (some.begin == some.end && adds) continue;
        const Part part{channels.in(p), channels.in(q), p == q && box.turned == b};
        product(left, right + box.shift * WIDTH<T>, some, part, adds, tiles[b]);
        next[b] = some.end;
        rest = true;
      }
    }
  }

  const Piece* first_piece(const Box& box, int64_t row) const {
    const auto before = [](const Piece& piece, int64_t row) { return piece.start < row; };
    return std::lower_bound(plan.pieces + box.begin, plan.pieces + box.end, row, before);
  }

  // The next ones that start before a row.
  static Pieces pieces(const Piece* begin, const Piece* stop, int64_t row) {
    const Piece* end = begin;
    for (int64_t n = 0; end < stop && end->start < row && n < DEPTH; ++end) n += end->length;
    return {begin, end};
  }

  T tall(const Windows<T>& windows, T* room, int threads) const {
    const auto tiles_of = [&](int64_t thread) {
      return reinterpret_cast<Tile<T>*>(room + thread * room_for_pairs());
    };
    T *images = room + threads * room_for_pairs(), trace = 0;
#pragma omp parallel num_threads(threads)
    {
      populate(windows.total, threads);
      const bool few = parts < threads;
      if (few) copy_parts(0, parts, images);
#pragma omp for schedule(static)
      for (int t = 0; t < threads; ++t) {
        const auto take = few ? &Moved::take_rows : &Moved::take_parts;
        (this->*take)({t, threads}, images, tiles_of(t));
      }
#pragma omp for schedule(dynamic) reduction(+ : trace)
      for (size_t n = 0; n < pairs.size(); ++n) {
        const int64_t before = pairs[n].before * plan.number;
        Tile<T>* all = tiles_of(0) + before;
        for (int t = 1; t < threads; ++t) add(pairs[n], tiles_of(t) + before, all);
        trace += windows.finish(pairs[n], windows.total.adds, all);
      }
      arrive();
    }
    return trace;
  }

  // By all threads.
  void copy_parts(int64_t first, int64_t number, T* images) const {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < number * panels; ++n)
      copy_panel(first + n / panels, n % panels, images + n * size);
  }

  // The rows of a thread, where there are few parts, of all of which there are copies.
  void take_rows(Share share, T* images, Tile<T>* tiles) const {
    for (int64_t part = 0; part < parts; ++part) {
      const auto bound = [&](int64_t shares) {
        const int64_t row = parts * plan.rows * shares / share.of - part * plan.rows;
        return std::clamp<int64_t>(row, 0, rows_in(part));
      };
      const Span rows{bound(share.part), bound(share.part + 1)};
      if (rows.begin < rows.end || part == 0)
        multiply_all(images + part * panels * size, rows, part > 0, tiles);
    }
  }

  // The parts of a thread, with copies of its own.
  void take_parts(Share share, T* images, Tile<T>* tiles) const {
    const int64_t begin = parts * share.part / share.of, end = parts * (share.part + 1) / share.of;
    T* own = images + share.part * panels * size;
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t p = 0; p < panels; ++p) copy_panel(part, p, own + p * size);
      multiply_all(own, {0, rows_in(part)}, part > begin, tiles);
    }
  }

  void multiply_all(const T* images, Span rows, bool adds, Tile<T>* tiles) const {
    for (const Pair& pair : pairs)
      multiply(pair, images, rows, adds, tiles + pair.before * plan.number);
  }

  // Add another thread's sums of two panels.
  void add(Pair pair, const Tile<T>* from, Tile<T>* to) const {
    for (int64_t b = 0; b < plan.number; ++b)
      if (pair.p != pair.q || plan.boxes[b].turned >= b) to[b].add(from[b]);
  }

  T wide(const Windows<T>& windows, T* room, int threads) const {
    T *images = room + threads * room_for_pair(), trace = 0;
#pragma omp parallel num_threads(threads)
    {
      populate(windows.total, threads);
      for (int64_t first = 0; first < parts; first += parts_together()) {
        const int64_t number = std::min(parts_together(), parts - first);
        copy_parts(first, number, images);
#pragma omp for schedule(static) reduction(+ : trace)
        for (int t = 0; t < threads; ++t) {
          Tile<T>* tiles = reinterpret_cast<Tile<T>*>(room + t * room_for_pair());
          for (const Pair& pair : pairs) {
            // Of two different panels there are twice as many products.
            const int64_t work = 2 * pair.before - pair.p;
            if (work * threads / (panels * panels) != t) continue;
            for (int64_t n = 0; n < number; ++n)
              multiply(pair, images + n * panels * size, {0, rows_in(first + n)}, n > 0, tiles);
            const T found = windows.finish(pair, windows.total.adds || first > 0, tiles);
            if (first + number == parts) trace += found;
          }
        }
      }
      arrive();
    }
    return trace;
  }
};

}  // namespace
}  // namespace vectors

// The sum of what is on the diagonal: no number, or infinite, if any window has such an entry.
extern "C" Number moved(Number* total, int64_t step, double scale, bool adds, const Number* x,
                        const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,
                        const vectors::Plan* plan, Number* room, int threads) {
  const Rows<Number> images{x, rows, columns, number, d};
  const Total<Number> sum{total, step, d * plan->taps, Number(scale), adds};
  return vectors::Moved<Number>(*plan, images).take(sum, room, threads);
}

extern "C" int64_t moved_room(int64_t number, int64_t d, const vectors::Plan* plan, int threads) {
  return vectors::Moved<Number>(*plan, {nullptr, nullptr, nullptr, number, d}).room(threads);
}
