//! How the heads of an attention layer lie in the rows of its projections.

use crate::view::ColsMut;

/// How the heads lie in a row of the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadOrder {
    /// All queries, all keys, all values.
    Parts,
    /// For each KV head its queries, its key, its value.
    Groups,
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How they lie in a row of the projection.
    pub order: HeadOrder,
}

impl Heads {
    /// Query heads of one KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Columns of the projection: queries, keys and values.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.queries() + 2 * self.keys()
    }

    /// Columns of the queries.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, or of the values.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Queries, key and value of each KV head in rows of the projection.
    #[must_use]
    pub fn divide<'a>(&self, rows: ColsMut<'a>) -> Vec<[ColsMut<'a>; 3]> {
        let (d, group) = (self.head_dim, self.group());
        match self.order {
            HeadOrder::Parts => {
                let (queries, rest) = rows.split_at(self.queries());
                let (keys, values) = rest.split_at(self.keys());
                let parts = (queries.chunks(group * d).into_iter())
                    .zip(keys.chunks(d))
                    .zip(values.chunks(d));
                parts.map(|((q, k), v)| [q, k, v]).collect()
            }
            HeadOrder::Groups => (rows.chunks((group + 2) * d).into_iter())
                .map(|part| {
                    let (queries, rest) = part.split_at(group * d);
                    let (key, value) = rest.split_at(d);
                    [queries, key, value]
                })
                .collect(),
        }
    }

    /// Queries, key and value of a KV head in a row of the projection.
    #[must_use]
    pub fn of<'a>(&self, kv_head: usize, row: &'a [f32]) -> [&'a [f32]; 3] {
        let (d, group) = (self.head_dim, self.group());
        let (queries, key, value) = match self.order {
            HeadOrder::Parts => {
                let keys = self.queries() + kv_head * d;
                (kv_head * group * d, keys, keys + self.keys())
            }
            HeadOrder::Groups => {
                let start = kv_head * (group + 2) * d;
                (start, start + group * d, start + (group + 1) * d)
            }
        };
        [
            &row[queries..][..group * d],
            &row[key..][..d],
            &row[value..][..d],
        ]
    }
}
