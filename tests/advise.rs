//! Advice: the model as its docs state it, its limits, and a calibration that really measures.

use crate::common::{Backend, FLOATS, cases};
use lora_switch::{Advice, Calibration, DType, Error, Strategy, TargetShape, Workload, advise};
use proptest::prelude::*;

const LAYER: [(u64, u64); 7] = [(4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)];
const GROUPS: [u64; 4] = [3, 1, 2, 1];

/// Llama-2-7B: its targets and groups.
fn llama() -> (Vec<TargetShape>, Vec<u64>) {
    let shape = |(out_features, in_features)| TargetShape { out_features, in_features, rank_cap: 256 };
    (LAYER.map(shape).repeat(32), GROUPS.repeat(32))
}

/// Numbers with few digits, so that a wrong term stands out.
const PLAIN: Calibration = Calibration {
    read_gb_per_s: 4000.0,
    copy_gb_per_s: 2000.0,
    launch_us: 1.0,
    switch_gb_per_s: 1500.0,
    apply_call_us: 5.0,
    few_rows_gb_per_s: 500.0,
    many_rows_gb_per_s: 8000.0,
    linear_call_us: 3.0,
    linear_adapters_us: 2.0,
    linear_gb_per_s: 1600.0,
    product_share: 0.5,
    product_tflops: 1000.0,
};

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-9 * want, "{got}, by hand {want}");
}

/// Two targets that share x and one that does not; slots of rank 4 and 8, the last target caps them at 4. bf16.
#[test]
fn is_what_the_formulas_say() {
    let shape = |out_features, in_features, rank_cap| TargetShape { out_features, in_features, rank_cap };
    let targets = [shape(1000, 500, 8), shape(200, 500, 8), shape(300, 1000, 4)];
    let at = |k, batch, tokens_per_route, dtype| {
        let workload = Workload { targets: &targets, groups: &[2, 1], dtype, ranks: &[4, 8], k, batch, tokens_per_route };
        advise(&PLAIN, &workload).unwrap()
    };
    let weights = 1000.0 * 500.0 + 200.0 * 500.0 + 300.0 * 1000.0;
    // Of a slot on average: rank 6 at the first two targets, 4 at the last.
    let slot = 2.0 * (6.0 * 1500.0 + 6.0 * 700.0 + 4.0 * 1300.0);
    let row = 2.0 * (1500.0 + 2.0 * 1500.0);
    let memory = 2.0 * weights / (0.5 * 4000.0) / 1e3;

    let one = at(1, 1, 1.0, DType::Bf16);
    close(one.switch_us, 1.0 + (4.0 * weights + slot) / 1500.0 / 1e3 + memory);
    close(one.apply_us, memory + 2.0 * 5.0 + slot / 4000.0 / 1e3 + slot / 500.0 / 1e3 + row / 2000.0 / 1e3);
    close(one.linear_us, 2.0 * (3.0 + 2.0) + 2.0 * weights / 1600.0 / 1e3 + slot / 4000.0 / 1e3 + slot / 500.0 / 1e3);

    // Eight sequences, two tokens a route: a switch multiplies two rows at a time; four routes of one of two slots miss one in 16.
    let eight = at(1, 8, 2.0, DType::Bf16);
    close(eight.switch_us, (1.0 + (4.0 * weights + slot) / 1500.0 / 1e3) / 2.0 + memory / 2.0);
    let distinct = 2.0 * (15.0 / 16.0) * slot / 4000.0 / 1e3;
    close(eight.apply_us, (memory + 10.0 + distinct) / 8.0 + slot / 500.0 / 1e3 + row / 2000.0 / 1e3);

    let stream = 2.0 * weights / 1600.0 / 1e3;
    close(eight.linear_us, (2.0 * 5.0 + stream + distinct + 8.0 * slot / 500.0 / 1e3) / 8.0);
    assert_eq!(at(1, 9, 2.0, DType::Bf16).linear_us, f64::INFINITY);
    // Where linear without adapters is the faster product, it serves all, eight rows at a time.
    let quick = Calibration { linear_call_us: 0.0, linear_gb_per_s: 3000.0, ..PLAIN };
    let workload =
        Workload { targets: &targets, groups: &[2, 1], dtype: DType::Bf16, ranks: &[4, 8], k: 0, batch: 8, tokens_per_route: 1e6 };
    let with_linear = advise(&quick, &workload).unwrap();
    close(with_linear.apply_us, (2.0 * weights / 3000.0 / 1e3 + 10.0) / 8.0 + row / 2000.0 / 1e3);
    close(with_linear.switch_us, (1.0 + 4.0 * weights / 1500.0 / 1e3) / 1e6 + 2.0 * weights / 3000.0 / 1e3 / 8.0);
    let nine = advise(&quick, &Workload { batch: 9, ..workload }).unwrap();
    close(nine.apply_us, 2.0 * weights / 3000.0 / 1e3 / 8.0 + 10.0 / 9.0 + row / 2000.0 / 1e3);
    let sixteen = advise(&quick, &Workload { batch: 16, ..workload }).unwrap();
    close(sixteen.apply_us, (memory + 10.0) / 16.0 + row / 2000.0 / 1e3);

    // Above 64 rows the other rate holds, in 16 bits; both slots, so that each adapter is read.
    let rest = |adapters: f64, rate: f64, row: f64| 10.0 / 65.0 + adapters / rate / 1e3 + row / 2000.0 / 1e3;
    let product = |bytes: f64| bytes * weights / (0.5 * 4000.0) / 1e3 / 65.0;
    close(at(2, 65, 1.0, DType::F16).apply_us, product(2.0) + 2.0 * slot / 4000.0 / 1e3 / 65.0 + rest(2.0 * slot, 8000.0, row));
    close(at(2, 65, 1.0, DType::F32).apply_us, product(4.0) + 4.0 * slot / 4000.0 / 1e3 / 65.0 + rest(4.0 * slot, 500.0, 2.0 * row));

    // Enough rows that arithmetic and not memory bounds the product.
    let many = at(0, 100_000, 1e6, DType::Bf16);
    close(many.apply_us, 2.0 * weights / 1000.0 / 1e6 + 10.0 / 1e5 + row / 2000.0 / 1e3);
    close(many.switch_us, (1.0 + 4.0 * weights / 1500.0 / 1e3) / 1e6 + 2.0 * weights / 1000.0 / 1e6);
}

/// The switch is right from the crossover of the docs on, and not before.
#[test]
fn turns_where_the_docs_say() {
    let (targets, groups) = llama();
    let slow = Calibration { linear_adapters_us: 50.0, ..PLAIN };
    let quick = Calibration { linear_adapters_us: 0.5, linear_call_us: 0.5, linear_gb_per_s: 2100.0, ..PLAIN };
    for (calibration, batch, rank) in [(slow, 1, 16), (slow, 1, 64), (quick, 1, 16), (quick, 4, 16), (slow, 32, 16)] {
        let ranks = [rank; 8];
        let at = |tokens_per_route: f64| {
            let (targets, groups) = (&targets, &groups);
            advise(&calibration, &Workload { targets, groups, dtype: DType::Bf16, ranks: &ranks, k: 2, batch, tokens_per_route }).unwrap()
        };
        // What the batch's adapters come to depends on R too, so from there on, where all rows have one route.
        let far = at(1e5);
        let weights = 32.0 * (4.0 * 4096.0 * 4096.0 + 3.0 * 4096.0 * 11008.0);
        let adapters = 2.0 * 2.0 * rank as f64 * 32.0 * (4.0 * 8192.0 + 3.0 * 15104.0);
        let linear = 128.0 * calibration.linear_call_us + 2.0 * weights / calibration.linear_gb_per_s / 1e3;
        let engine = 2.0 * weights / (0.5 * 4000.0) / 1e3;
        let product = engine.min(linear * (batch as f64 / 8.0).max(1.0)) / batch as f64;
        let (unmerged, other) =
            if far.linear_us < far.apply_us { (Strategy::Linear, far.linear_us) } else { (Strategy::Apply, far.apply_us) };
        let crossover = (1.0 + (4.0 * weights + adapters) / 1500.0 / 1e3) / (other - product);
        assert!(crossover > batch as f64, "{crossover}");
        assert_eq!(at(crossover * 0.999).best, unmerged, "batch {batch}, rank {rank}: before {crossover}");
        assert_eq!(at(crossover * 1.001).best, Strategy::Switch, "batch {batch}, rank {rank}: after {crossover}");
    }
}

proptest! {
    #![proptest_config(cases(256))]
    /// More tokens for a route never cost more a token; the best is the least; all are positive.
    #[test]
    fn falls_with_tokens_per_route(
        (rank, k, slots) in (0u64..=256, 0u64..=32, 1usize..20),
        batch in prop_oneof![1u64..9, 1u64..5000],
        tokens in prop::collection::vec(1f64..1e6, 2..8),
        d in 0usize..3,
    ) {
        let (targets, groups) = llama();
        let mut tokens = tokens;
        tokens.sort_by(f64::total_cmp);
        let mut last: Option<Advice> = None;
        for tokens_per_route in tokens {
            let (ranks, dtype) = (vec![rank; slots], FLOATS[d]);
            let workload = Workload { targets: &targets, groups: &groups, dtype, ranks: &ranks, k, batch, tokens_per_route };
            let advice = advise(&Calibration::H200, &workload).unwrap();
            for strategy in Strategy::ALL {
                prop_assert!(advice.us(strategy) > 0.0 && advice.us(advice.best) <= advice.us(strategy));
                prop_assert!(last.is_none_or(|last| advice.us(strategy) <= last.us(strategy) * (1.0 + 1e-12)));
            }
            last = Some(advice);
        }
    }
}

#[test]
fn bad_arguments_are_named() {
    let shape = |out_features, in_features, rank_cap| TargetShape { out_features, in_features, rank_cap };
    let targets = [shape(8, 4, 2), shape(8, 4, 2), shape(8, 6, 2)];
    let good = Workload { targets: &targets, groups: &[2, 1], dtype: DType::F32, ranks: &[2], k: 1, batch: 1, tokens_per_route: 1.0 };
    advise(&PLAIN, &good).unwrap();
    let refused = |name: &str, calibration: Calibration, workload: Workload<'_>| {
        let error = advise(&calibration, &workload).unwrap_err();
        assert!(matches!(&error, Error::Argument { name: n, .. } if n == name), "{error} should name {name}");
    };
    refused("dtype", PLAIN, Workload { dtype: DType::I32, ..good });
    refused("ranks", PLAIN, Workload { ranks: &[], ..good });
    refused("ranks[1]", PLAIN, Workload { ranks: &[256, 257], ..good });
    refused("k", PLAIN, Workload { k: 33, ..good });
    refused("batch", PLAIN, Workload { batch: 0, ..good });
    refused("batch", PLAIN, Workload { batch: 1 << 31, ..good });
    for tokens_per_route in [0.5, -1.0, f64::NAN, f64::INFINITY] {
        refused("tokens_per_route", PLAIN, Workload { tokens_per_route, ..good });
    }
    refused("groups", PLAIN, Workload { groups: &[2], ..good });
    refused("groups[0]", PLAIN, Workload { groups: &[0, 2, 1], ..good });
    refused("groups[1]", PLAIN, Workload { groups: &[2, 2], ..good });
    refused("groups[0]", PLAIN, Workload { targets: &[targets[0]; 9], groups: &[9], ..good });
    refused("targets[2].in_features", PLAIN, Workload { groups: &[1, 2], ..good });
    refused("targets[0].rank_cap", PLAIN, Workload { targets: &[shape(8, 4, 257)], groups: &[1], ..good });
    refused("targets[0].out_features", PLAIN, Workload { targets: &[shape(1 << 31, 4, 2)], groups: &[1], ..good });
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused("calibration.read_gb_per_s", Calibration { read_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.copy_gb_per_s", Calibration { copy_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.switch_gb_per_s", Calibration { switch_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.few_rows_gb_per_s", Calibration { few_rows_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.linear_gb_per_s", Calibration { linear_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.many_rows_gb_per_s", Calibration { many_rows_gb_per_s: bad, ..PLAIN }, good);
        refused("calibration.product_share", Calibration { product_share: bad, ..PLAIN }, good);
    }
    refused("calibration.product_tflops", Calibration { product_tflops: 0.0, ..PLAIN }, good);
    refused("calibration.launch_us", Calibration { launch_us: -0.1, ..PLAIN }, good);
    refused("calibration.apply_call_us", Calibration { apply_call_us: f64::NAN, ..PLAIN }, good);
    refused("calibration.linear_call_us", Calibration { linear_call_us: f64::INFINITY, ..PLAIN }, good);
    refused("calibration.linear_adapters_us", Calibration { linear_adapters_us: -1.0, ..PLAIN }, good);
    advise(&Calibration { launch_us: 0.0, apply_call_us: 0.0, product_tflops: f64::INFINITY, ..PLAIN }, &good).unwrap();
    // Nothing to serve costs nothing.
    let nothing = advise(&PLAIN, &Workload { targets: &[], groups: &[], ..good }).unwrap();
    assert_eq!((nothing.best, nothing.apply_us, nothing.linear_us), (Strategy::Apply, 0.0, 0.0));
}

/// The structs of the header, for a call through C's door.
#[cfg(feature = "capi")]
mod c {
    #[repr(C)]
    pub struct Calibration {
        pub struct_size: u64,
        pub figures: [f64; FIGURES],
    }
    pub const FIGURES: usize = 12;

    #[repr(C)]
    pub struct Workload {
        pub struct_size: u64,
        pub targets: *const [u64; 3],
        pub count: u64,
        pub groups: *const u64,
        pub group_count: u64,
        pub ranks: *const u64,
        pub slots: u64,
        pub dtype: i32,
        pub reserved: i32,
        pub k: u64,
        pub batch: u64,
        pub tokens_per_route: f64,
    }

    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Advice {
        pub struct_size: u64,
        pub best: i32,
        pub reserved: i32,
        pub us: [f64; STRATEGIES],
    }
    pub const STRATEGIES: usize = lora_switch::Strategy::ALL.len();

    unsafe extern "C" {
        pub fn lsw_advise(calibration: *const Calibration, workload: *const Workload, advice: *mut Advice) -> i32;
    }
}

/// C gets what Rust gets, to the bit; a struct of an older header gets what it has room for.
#[cfg(feature = "capi")]
#[test]
fn c_agrees_with_rust() {
    let (targets, groups) = llama();
    let raw: Vec<[u64; 3]> = targets.iter().map(|t| [t.out_features, t.in_features, t.rank_cap]).collect();
    let ranks = [8u64, 16, 16, 64];
    let c = PLAIN;
    let figures = [
        c.read_gb_per_s,
        c.copy_gb_per_s,
        c.launch_us,
        c.switch_gb_per_s,
        c.apply_call_us,
        c.few_rows_gb_per_s,
        c.many_rows_gb_per_s,
        c.linear_call_us,
        c.linear_adapters_us,
        c.linear_gb_per_s,
        c.product_share,
        c.product_tflops,
    ];
    let plain = c::Calibration { struct_size: size_of::<c::Calibration>() as u64, figures };
    for (number, dtype, batch, tokens_per_route) in [(0, DType::F32, 1, 1.0), (1, DType::F16, 8, 30.5), (2, DType::Bf16, 4096, 1e4)] {
        let of_c = c::Workload {
            struct_size: size_of::<c::Workload>() as u64,
            targets: raw.as_ptr(),
            count: raw.len() as u64,
            groups: groups.as_ptr(),
            group_count: groups.len() as u64,
            ranks: ranks.as_ptr(),
            slots: ranks.len() as u64,
            dtype: number,
            reserved: 0,
            k: 2,
            batch,
            tokens_per_route,
        };
        let of_rust = Workload { targets: &targets, groups: &groups, dtype, ranks: &ranks, k: 2, batch, tokens_per_route };
        for (calibration, given) in [(PLAIN, &raw const plain), (Calibration::H200, std::ptr::null())] {
            let want = advise(&calibration, &of_rust).unwrap();
            let size = size_of::<c::Advice>() as u64;
            let poison = c::Advice { struct_size: size, best: -1, reserved: -1, us: [-1.0; c::STRATEGIES] };
            let us = Strategy::ALL.map(|strategy| want.us(strategy));
            let (mut whole, mut short) = (poison, c::Advice { struct_size: 16, ..poison });
            // SAFETY: structs of the header's layout, whose pointers have as many elements as they say.
            let status = unsafe { [c::lsw_advise(given, &of_c, &mut whole), c::lsw_advise(given, &of_c, &mut short)] };
            assert_eq!(status, [0; 2]);
            assert_eq!(whole, c::Advice { struct_size: size, best: want.best as i32, reserved: 0, us });
            assert_eq!(short, c::Advice { struct_size: 16, best: want.best as i32, reserved: 0, ..poison });
        }
    }
}

/// Figures of a real machine, however busy; and advice can be had from them.
fn calibrates(backend: &Backend) {
    let found = Calibration::measure(&backend.stream).unwrap();
    let (targets, groups) = llama();
    let (targets, groups) = (&targets, &groups);
    advise(&found, &Workload { targets, groups, dtype: DType::Bf16, ranks: &[16; 8], k: 2, batch: 1, tokens_per_route: 1.0 }).unwrap();
    for rate in [found.read_gb_per_s, found.copy_gb_per_s, found.switch_gb_per_s, found.linear_gb_per_s] {
        assert!(rate > 0.0 && rate < 1e5, "{found:?}");
    }
    assert!(found.launch_us > 0.0 && found.launch_us.is_finite(), "{found:?}");
    eprintln!("{found:?}");
    // Whatever ran before, the stream goes on.
    backend.synchronize();
}

on_backends!(calibrates);
