//! The safe Rust API as an engine uses it: Vecs and cudarc slices, no addresses.

use crate::common::Backend;
use cudarc::driver::CudaContext;
use half::bf16;
use lora_switch::{
    AdapterBank, Context, DType, Error, Factor, Mat, MatMut, RouteOptions, StateMemory, SwitchOptions, SwitchSet, Target, TargetShape,
    Tensor, Weight, measure, route,
};

const SHAPE: TargetShape = TargetShape { out_features: 3, in_features: 4, rank_cap: 2 };

fn bf(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// B A with B = [1 2; 0 1; 1 0] and A = [1 0 1 0; 0 1 0 1], on a base of ones: small integers, exact in every type.
const A: [f32; 8] = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0];
const B: [f32; 6] = [1.0, 2.0, 0.0, 1.0, 1.0, 0.0];
const MERGED: [f32; 12] = [3.0, 5.0, 3.0, 5.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0, 1.0];

#[test]
fn on_the_cpu() {
    let context = Context::cpu(1).unwrap();
    let stream = context.cpu_stream().unwrap();
    let bank = AdapterBank::new(&stream, DType::Bf16, 2, &[SHAPE], StateMemory::allocate()).unwrap();
    let target =
        Target { weight: Weight::from_vec(bf(&[0.0; 12]), 3, 4).unwrap(), base: Some(Tensor::from_vec(bf(&[1.0; 12]), 3, 4).unwrap()) };
    let mut set = SwitchSet::new(&stream, &bank, vec![target], SwitchOptions::default()).unwrap();
    let factor = Factor { a: Tensor::from_vec(bf(&A), 2, 4).unwrap(), b: Tensor::from_vec(bf(&B), 3, 2).unwrap(), scale: 2.0 };
    bank.set_slot(&stream, 1, &[Some(factor)]).unwrap();

    let logits = [-1.0f32, 9.0];
    let (mut ids, mut gates) = ([7i32; 1], [7f32; 1]);
    route(
        &stream,
        &RouteOptions::default(),
        &Mat::host(&logits, 1, 2).unwrap(),
        &mut MatMut::host(&mut ids, 1, 1).unwrap(),
        &mut MatMut::host(&mut gates, 1, 1).unwrap(),
    )
    .unwrap();
    set.to(&stream, &Mat::host(&ids, 1, 1).unwrap(), &Mat::host(&gates, 1, 1).unwrap()).unwrap();
    let weight = set.weight(0).unwrap();
    let rows: Vec<f32> = (0..3).flat_map(|r| weight.row::<bf16>(r).unwrap().iter().map(|x| x.to_f32())).collect();
    assert_eq!(rows, MERGED);
    assert!(weight.row::<f32>(0).is_err() && weight.row::<bf16>(3).is_err());
}

#[test]
fn on_cudarc_slices() {
    if Backend::cuda().is_none() {
        return;
    }
    // Event tracking stays on here, as an engine that knows nothing of it would have it.
    let cuda = CudaContext::new(0).unwrap();
    let context = Context::from_cudarc(&cuda).unwrap();
    let (engine, other) = (cuda.new_stream().unwrap(), cuda.new_stream().unwrap());
    let stream = context.cuda_stream(&engine).unwrap();
    let upload = |x: &[f32]| engine.clone_htod(&bf(x)).unwrap();
    let bank = AdapterBank::new(&stream, DType::Bf16, 2, &[SHAPE], StateMemory::allocate()).unwrap();
    let target = Target {
        weight: Weight::from_cuda(upload(&[0.0; 12]), 3, 4, 4).unwrap(),
        base: Some(Tensor::from_cuda(upload(&[1.0; 12]), 3, 4, 4).unwrap()),
    };
    let mut set = SwitchSet::new(&stream, &bank, vec![target], SwitchOptions::default()).unwrap();
    let tensor = |x: &[f32], rows, cols| Tensor::from_cuda(upload(x), rows, cols, cols).unwrap();
    let factor = || Factor { a: tensor(&A, 2, 4), b: tensor(&B, 3, 2), scale: 2.0 };
    bank.set_slot(&stream, 1, &[Some(factor())]).unwrap();

    let logits = engine.clone_htod(&[-1.0f32, 9.0]).unwrap();
    let mut ids = engine.alloc_zeros::<i32>(1).unwrap();
    let mut gates = engine.alloc_zeros::<f32>(1).unwrap();
    {
        let x = Mat::cuda(&logits, &stream, 1, 2, 2).unwrap();
        let mut ids = MatMut::cuda(&mut ids, &stream, 1, 1, 1).unwrap();
        let mut gates = MatMut::cuda(&mut gates, &stream, 1, 1, 1).unwrap();
        route(&stream, &RouteOptions::default(), &x, &mut ids, &mut gates).unwrap();
    }
    set.to(&stream, &Mat::cuda(&ids, &stream, 1, 1, 1).unwrap(), &Mat::cuda(&gates, &stream, 1, 1, 1).unwrap()).unwrap();
    assert!(set.odd(&stream).unwrap().is_none());
    let address = set.weight(0).unwrap().addr();
    assert_eq!(download(&engine, address, 12), MERGED);
    // Refilled with the same content while earlier work may be in flight: freed in stream order, and healed.
    bank.set_slot(&stream, 1, &[Some(factor())]).unwrap();
    set.to(&stream, &Mat::cuda(&ids, &stream, 1, 1, 1).unwrap(), &Mat::cuda(&gates, &stream, 1, 1, 1).unwrap()).unwrap();
    assert_eq!(download(&engine, address, 12), MERGED);

    // What belongs to one stream is refused on another.
    let foreign = context.cuda_stream(&other).unwrap();
    let named = |e: Error, name: &str| assert!(matches!(&e, Error::Argument { name: n, .. } if n.contains(name)), "{e}");
    named(Mat::cuda(&ids, &foreign, 1, 1, 1).unwrap_err(), "stream");
    named(set.unmerge(&foreign).unwrap_err(), "stream");
    named(bank.set_slot(&foreign, 0, &[Some(factor())]).unwrap_err(), "stream");
    let host = [1.0f32; 2];
    let mut out = engine.alloc_zeros::<i32>(1).unwrap();
    let mut gates = engine.alloc_zeros::<f32>(1).unwrap();
    let error = route(
        &stream,
        &RouteOptions::default(),
        &Mat::host(&host, 1, 2).unwrap(),
        &mut MatMut::cuda(&mut out, &stream, 1, 1, 1).unwrap(),
        &mut MatMut::cuda(&mut gates, &stream, 1, 1, 1).unwrap(),
    );
    named(error.unwrap_err(), "logits.data");

    // A capture with event tracking on would break: refused before it does.
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    engine.synchronize().unwrap();
    engine.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let refused = Mat::cuda(&ids, &stream, 1, 1, 1).err();
    engine.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    named(refused.expect("a capture with event tracking on"), "stream");
}

fn download(stream: &std::sync::Arc<cudarc::driver::CudaStream>, address: u64, n: usize) -> Vec<f32> {
    let mut host = vec![bf16::ZERO; n];
    // SAFETY: the set's weight of n elements, copied in stream order and waited for.
    unsafe { cudarc::driver::result::memcpy_dtoh_async(&mut host, address, stream.cu_stream()) }.unwrap();
    stream.synchronize().unwrap();
    host.iter().map(|x| x.to_f32()).collect()
}

/// Without a driver or kernels, asking for CUDA says what is missing; with them it works. Either way nothing panics.
#[test]
fn a_missing_gpu_is_said() {
    match Context::cuda(0) {
        Ok(context) => {
            let error = Context::cuda(1000).unwrap_err().to_string();
            assert!(error.contains("ordinal is 1000"), "{error}");
            assert!(context.cpu_stream().is_err());
        }
        Err(e @ (Error::NoDevice { .. } | Error::NoKernels { .. })) => assert!(e.to_string().len() > 20, "{e}"),
        Err(e) => panic!("{e}"),
    }
}

/// The same random numbers on both backends, and the scale kernel's product.
#[test]
fn measuring_tools() {
    let n = 200_003;
    let mut seen: Option<Vec<u32>> = None;
    for (name, backend) in Backend::all() {
        let mut x = crate::common::Grid::poisoned(&backend, DType::Bf16, 1, n, crate::common::Layout::dense(n));
        let mut y = crate::common::Grid::poisoned(&backend, DType::Bf16, 1, n, crate::common::Layout::dense(n));
        measure::fill_random(&backend.stream, 5, 2.0, &mut x.mat_mut()).unwrap();
        measure::scale(&backend.stream, 0.5, &x.mat(), &mut y.mat_mut()).unwrap();
        let (xs, ys) = (x.values(), y.values());
        assert!(xs.iter().zip(&ys).all(|(x, y)| x / 2.0 == *y), "{name}");
        let mean = xs.iter().sum::<f64>() / n as f64;
        let square = xs.iter().map(|x| x * x).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (square - 4.0 / 3.0).abs() < 0.02, "{name}: mean {mean}, mean square {square}");
        measure::scale_in_place(&backend.stream, 2.0, &mut y.mat_mut()).unwrap();
        assert_eq!(y.bits(), x.bits(), "{name}");
        let bits = x.bits();
        assert_eq!(seen.get_or_insert_with(|| bits.clone()), &bits, "{name}");
    }
}

/// Three runs three times over, and the xor of three equal ones, which is that one.
#[test]
fn runs_repeat_and_fold() {
    let (run, times) = (4096, 3);
    for (name, backend) in Backend::all() {
        let grid = |n| crate::common::Grid::poisoned(&backend, DType::Bf16, 1, n, crate::common::Layout::dense(n));
        let (mut x, mut y, mut z) = (grid(3 * run), grid(9 * run), grid(3 * run));
        measure::fill_random(&backend.stream, 5, 2.0, &mut x.mat_mut()).unwrap();
        measure::repeat(&backend.stream, times, &x.mat(), &mut y.mat_mut()).unwrap();
        let bits = x.bits();
        for (i, copy) in y.bits().chunks(run).enumerate() {
            assert!(copy == &bits[i / 3 * run..][..run], "{name}: copy {i}");
        }
        measure::fold(&backend.stream, times, &y.mat(), &mut z.mat_mut()).unwrap();
        assert_eq!(z.bits(), bits, "{name}");
        let refused = measure::repeat(&backend.stream, 33, &x.mat(), &mut y.mat_mut()).unwrap_err();
        assert!(refused.to_string().contains("times is 33"), "{refused}");
        let refused = measure::fold(&backend.stream, 2, &y.mat(), &mut z.mat_mut()).unwrap_err();
        assert!(refused.to_string().contains("x.cols"), "{refused}");
    }
}
