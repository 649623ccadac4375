//! NVIDIA's cuBLAS at the products of a prompt in bf16: the matrices, tokens and check of `linear`. Gates and what they
//! are for are one product here, without the gate.

use crate::linear::{MEMORY_TOKENS, Matrices, Product, cost, matrices, once};
use crate::timing::{Bench, Case, Work};
use phidias::engine::kernels::cuda::cublas::Cublas;
use phidias::engine::kernels::cuda::linear::{Elements, Layout};
use phidias::engine::kernels::cuda::{Activations, Device, DeviceError};
use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;

pub fn bench(bench: &mut Bench, library: Cublas) {
    let (shapes, library) = (bench.shapes, Rc::new(library));
    for (name, rows, cols, _) in matrices(&shapes) {
        let layout = Layout::new(Elements::Bf16, rows, cols).expect("a shape");
        let prompts = shapes.tokens.iter().filter(|count| **count > MEMORY_TOKENS);
        let cases: Vec<_> = prompts
            .map(|&count| Case {
                count,
                cost: cost(&layout, 1, [count; 2], rows),
            })
            .collect();
        let device = Arc::clone(&bench.device);
        let matrices = OnceCell::new();
        let what = format!("cuBLAS bf16, {name} {rows} x {cols}");
        bench.run(&what, &cases, |case| {
            let make = || Matrices::new(&device, layout, 1, shapes.working_set);
            let matrices = once(&matrices, make)?;
            Ok(ByCublas {
                product: Product::new(&device, matrices, false, case.count)?,
                library: Rc::clone(&library),
            })
        });
    }
}

/// The same product by the library.
struct ByCublas {
    product: Product,
    library: Rc<Cublas>,
}

impl Work for ByCublas {
    fn turns(&self) -> usize {
        self.product.turns()
    }

    fn launch(&self, _: &dyn Device, turn: usize) -> Result<(), DeviceError> {
        let Product {
            matrices, input, y, ..
        } = &self.product;
        let Activations::Bf16(x) = input.activations() else {
            unreachable!("what meets bf16")
        };
        let w = matrices.data(turn).cast();
        (self.library).product(w, x, matrices.layout.cols(), y.span())
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.product.check()
    }
}
