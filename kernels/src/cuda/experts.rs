//! The router, the grouping of tokens by expert and the weighted sum on a device; the maths is in
//! `experts.cu`, the products of the experts are in [`super::linear`].

use super::device::{Arg, Device, DeviceError, Kernel, Launch, Source, Span};
use super::linear::{FEW, MANY, number};

/// The kernels of `experts.cu`.
pub(super) const KERNELS: &[&str] = &["route", "sum_picks"];

/// Experts that a token is given to.
pub const PICKS: usize = 2;

/// Threads of the block that routes: 16 warps, one for each expert of Phi-3.5-MoE.
const ROUTE_THREADS: u32 = 512;
/// Threads of a block that sums.
const SUM_THREADS: u32 = 256;
/// Words of a tile.
const TILE_WORDS: usize = 4;

/// Where the tokens of a pass go, in device memory: written by [`route`], read by the products of the
/// experts and by [`sum_picks`]. A *place* is a row of their results, which are grouped by expert.
#[derive(Clone, Copy, Debug)]
pub struct Routes<'m> {
    tokens: usize,
    experts: usize,
    /// `[tokens][PICKS]`: experts, the likelier one first.
    picks: Span<'m, u32>,
    /// `[tokens][PICKS]`: factors on their outputs.
    weights: Span<'m, f32>,
    /// `[tokens][PICKS]`: the place of each pick.
    places: Span<'m, u32>,
    /// `[places]`: the token of each.
    pub(super) sources: Span<'m, u32>,
    /// `[tiles][4]`: expert, first place, places, 0.
    pub(super) tile_list: Span<'m, u32>,
}

impl<'m> Routes<'m> {
    /// Words of memory that the routes of `tokens` tokens take; more tokens never take fewer.
    #[must_use]
    pub fn words(tokens: usize, experts: usize) -> usize {
        let places = tokens * PICKS;
        4 * places + most_tiles(places, experts, FEW) * TILE_WORDS
    }

    /// The routes of `tokens` tokens, at the beginning of `words`; to be written by [`route`].
    /// # Panics
    /// When there are fewer than [`Routes::words`], or fewer experts than [`PICKS`].
    #[must_use]
    pub fn new(words: Span<'m, u32>, tokens: usize, experts: usize) -> Self {
        assert!(experts >= PICKS, "{experts} experts for {PICKS} picks");
        let needed = Self::words(tokens, experts);
        assert!(
            words.len() >= needed,
            "{} words for routes of {needed}",
            words.len()
        );
        let places = tokens * PICKS;
        let part = |i: usize| words.slice(i * places..(i + 1) * places);
        let tiles = most_tiles(places, experts, tile(places, experts));
        Self {
            tokens,
            experts,
            picks: part(0),
            weights: part(1).cast(),
            places: part(2),
            sources: part(3),
            tile_list: words.slice(4 * places..4 * places + tiles * TILE_WORDS),
        }
    }

    /// Tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Experts there are.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of the experts' results.
    #[must_use]
    pub fn places(&self) -> usize {
        self.sources.len()
    }

    /// `[tokens][PICKS]`: the experts of each token, the likelier one first.
    #[must_use]
    pub fn picks(&self) -> Span<'m, u32> {
        self.picks
    }

    /// `[tokens][PICKS]`: the factors on their outputs.
    #[must_use]
    pub fn weights(&self) -> Span<'m, f32> {
        self.weights
    }

    /// `[tokens][PICKS]`: the row of the experts' results that each pick has.
    #[must_use]
    pub fn places_of_picks(&self) -> Span<'m, u32> {
        self.places
    }

    /// Tiles that there are at most; those past the last one are empty.
    pub(super) fn tiles(&self) -> usize {
        self.tile_list.len() / TILE_WORDS
    }

    /// Places of a tile at most.
    pub(super) fn tile(&self) -> usize {
        tile(self.places(), self.experts)
    }
}

/// Places of a tile: few where an expert has few on average, since each tile reads its expert's weights.
fn tile(places: usize, experts: usize) -> usize {
    if places > 2 * FEW * experts {
        MANY
    } else {
        FEW
    }
}

/// Tiles of `size` that so many places make at most, however they are spread over the experts.
fn most_tiles(places: usize, experts: usize, size: usize) -> usize {
    places.min(places / size + experts)
}

/// Bytes of the counts of so many experts.
#[must_use]
pub fn load_bytes(experts: usize) -> usize {
    (experts + 1) * size_of::<u64>()
}

/// Picks the experts of each token by its scores, `[tokens, experts]`, and groups the tokens by expert. To
/// `loads`, `[experts + 1]`, it adds the tokens of each expert and, last, how many experts have any.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When a length does not fit.
pub fn route(
    device: &dyn Device,
    scores: Span<'_, f32>,
    jitter: f32,
    routes: &Routes<'_>,
    loads: Span<'_, u64>,
) -> Result<(), DeviceError> {
    let Routes {
        tokens, experts, ..
    } = *routes;
    assert_eq!(
        scores.len(),
        tokens * experts,
        "scores of {tokens} tokens for {experts} experts"
    );
    assert_eq!(
        loads.len(),
        experts + 1,
        "counts of {experts} experts, and one more"
    );
    if tokens == 0 {
        return Ok(());
    }
    let kernel = Kernel {
        source: Source::Experts,
        name: "route",
    };
    let launch = Launch {
        grid: [1, 1, 1],
        block: [ROUTE_THREADS, 1, 1],
        shared: 2 * (experts + 1) * size_of::<u32>(),
    };
    let args = [
        scores.on(device),
        Arg::U32(number(tokens)),
        Arg::U32(number(experts)),
        Arg::F32(jitter),
        Arg::U32(number(routes.tile())),
        Arg::U32(number(routes.tiles())),
        routes.picks.on(device),
        routes.weights.on(device),
        routes.places.on(device),
        routes.sources.on(device),
        routes.tile_list.on(device),
        loads.on(device),
    ];
    // SAFETY: `args` are those of the kernel. It reads `tokens * experts` scores and writes two words a token
    // to each of the four lists and `tiles` tiles, which are as long by construction; it makes no more tiles
    // than `most_tiles`. It adds to `experts + 1` counts.
    unsafe { device.launch(kernel, launch, &args) }
}

/// The weighted sum of each token's experts: `outputs` is `[places, cols]`, `y` is `[tokens, cols]`.
/// # Errors
/// When the device refuses the launch.
/// # Panics
/// When a length does not fit.
pub fn sum_picks(
    device: &dyn Device,
    outputs: Span<'_, f32>,
    routes: &Routes<'_>,
    cols: usize,
    y: Span<'_, f32>,
) -> Result<(), DeviceError> {
    assert_eq!(
        outputs.len(),
        routes.places() * cols,
        "outputs of the experts"
    );
    assert_eq!(
        y.len(),
        routes.tokens * cols,
        "sums of the experts' outputs"
    );
    if y.is_empty() {
        return Ok(());
    }
    let kernel = Kernel {
        source: Source::Experts,
        name: "sum_picks",
    };
    let launch = Launch {
        grid: [
            number(routes.tokens),
            number(cols.div_ceil(SUM_THREADS as usize)),
            1,
        ],
        block: [SUM_THREADS, 1, 1],
        shared: 0,
    };
    let args = [
        outputs.on(device),
        routes.places.on(device),
        routes.weights.on(device),
        Arg::U32(number(cols)),
        y.on(device),
    ];
    // SAFETY: `args` are those of the kernel. It reads two places of each token, which `route` made and
    // which are below `places()`, and of `outputs` their rows; it writes `tokens` rows of `cols`.
    unsafe { device.launch(kernel, launch, &args) }
}
