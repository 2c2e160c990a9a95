//! The peer of the switch: cuBLAS, one product a matrix over adapters that were concatenated beforehand, in
//! one graph.

use crate::lab::{Buffer, Failure, Lab, Result};
use crate::model::{Model, offsets};
use crate::timing::Work;
use cudarc::cublas::sys as blas;
use cudarc::cublaslt::{result as lt_call, sys as lt};
use lora_switch::{DType, Form};
use std::ffi::c_void;
use std::path::PathBuf;
use std::process::Command;
use std::ptr;

/// What NVIDIA recommends on Hopper, and what torch gives it.
const WORKSPACE_BYTES: u64 = 32 << 20;

/// D [out, in] = C + B A, with A [k, in] and B [out, k]: row-major, dense, by address.
struct Product {
    out: u64,
    cols: u64,
    k: u64,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
}

pub struct Cublas {
    plain: blas::cublasHandle_t,
    light: lt::cublasLtHandle_t,
    version: i32,
    workspace: Buffer,
}

fn said(call: &str, status: impl std::fmt::Debug) -> Failure {
    Failure::Broken(format!("{call}: {status:?}"))
}

impl Cublas {
    pub fn open(lab: &Lab) -> Result<Self> {
        if !is_loadable() {
            return Err(Failure::Skip("libcublas cannot be loaded (LORA_SWITCH_CUBLAS may name its folder)".into()));
        }
        let workspace = lab.buffer(DType::U8, WORKSPACE_BYTES)?;
        lab.cuda.context().bind_to_thread()?;
        let (mut plain, mut version) = (ptr::null_mut(), 0);
        let memory = workspace.address(0, WORKSPACE_BYTES) as *mut c_void;
        // SAFETY: valid pointers, a live stream, and memory that lives as long as the handle.
        unsafe {
            blas::cublasCreate_v2(&mut plain).result().map_err(|e| said("cublasCreate", e))?;
            blas::cublasGetVersion_v2(plain, &mut version).result().map_err(|e| said("cublasGetVersion", e))?;
            let stream = lab.cuda.cu_stream().cast();
            blas::cublasSetStream_v2(plain, stream).result().map_err(|e| said("cublasSetStream", e))?;
            let set = blas::cublasSetWorkspace_v2(plain, memory, WORKSPACE_BYTES as usize);
            set.result().map_err(|e| said("cublasSetWorkspace", e))?;
        }
        let light = lt_call::create_handle().map_err(|e| said("cublasLtCreate", e))?;
        Ok(Self { plain, light, version, workspace })
    }

    fn multiply(&self, lab: &Lab, dtype: DType, product: &Product) -> Result<()> {
        if product.c == product.d { self.add_in_place(dtype, product) } else { self.add_from(lab, dtype, product) }
    }

    /// What torch's `addmm_` calls. To cuBLAS, whose matrices are column-major, ours are transposed:
    /// D' = C' + A' B'.
    fn add_in_place(&self, dtype: DType, p: &Product) -> Result<()> {
        let (one, none) = (1f32, blas::cublasOperation_t::CUBLAS_OP_N);
        let scalar = ptr::from_ref(&one).cast();
        let kind = kind(dtype);
        let (m, n, k) = (p.cols as i32, p.out as i32, p.k as i32);
        let (a, b, d) = (p.a as *const c_void, p.b as *const c_void, p.d as *mut c_void);
        let (compute, algorithm) = (blas::cublasComputeType_t::CUBLAS_COMPUTE_32F, blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT);
        // SAFETY: dense matrices of these shapes in device memory; the call reads the scalars itself.
        let status = unsafe {
            blas::cublasGemmEx(self.plain, none, none, m, n, k, scalar, a, kind, m, b, kind, k, scalar, d, kind, m, compute, algorithm)
        };
        status.result().map_err(|e| said("cublasGemmEx", e))
    }

    /// y [rows, out] = x [rows, cols] W [out, cols]' + beta y, row-major and dense, by address: what torch's `linear` calls with beta 0.
    pub fn linear(&self, dtype: DType, [rows, out, cols]: [u64; 3], [x, w, y]: [u64; 3], beta: f32) -> Result<()> {
        let one = 1f32;
        let (transposed, none) = (blas::cublasOperation_t::CUBLAS_OP_T, blas::cublasOperation_t::CUBLAS_OP_N);
        let (alpha, beta, kind) = (ptr::from_ref(&one).cast(), ptr::from_ref(&beta).cast(), kind(dtype));
        let (m, n, k) = (out as i32, rows as i32, cols as i32);
        let (w, x, y) = (w as *const c_void, x as *const c_void, y as *mut c_void);
        let (compute, algorithm) = (blas::cublasComputeType_t::CUBLAS_COMPUTE_32F, blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT);
        // SAFETY: dense matrices of these shapes in device memory; the call reads the scalars itself.
        let status = unsafe {
            blas::cublasGemmEx(self.plain, transposed, none, m, n, k, alpha, w, kind, k, x, kind, k, beta, y, kind, m, compute, algorithm)
        };
        status.result().map_err(|e| said("cublasGemmEx", e))
    }

    pub fn name(&self) -> String {
        format!("cuBLAS {}", self.version)
    }

    /// C is another matrix than D: only the light interface does that without a copy.
    fn add_from(&self, lab: &Lab, dtype: DType, p: &Product) -> Result<()> {
        let kind = match dtype {
            DType::F32 => lt::cudaDataType::CUDA_R_32F,
            DType::F16 => lt::cudaDataType::CUDA_R_16F,
            _ => lt::cudaDataType::CUDA_R_16BF,
        };
        let plan = LightPlan::new(kind, p).map_err(|e| said("cublasLt", e))?;
        let one = 1f32;
        let scalar = ptr::from_ref(&one).cast();
        let workspace = self.workspace.address(0, WORKSPACE_BYTES) as *mut c_void;
        let (a, b, c, d) = (p.a as *const c_void, p.b as *const c_void, p.c as *const c_void, p.d as *mut c_void);
        let [layout_a, layout_b, layout_d] = plan.layouts;
        // SAFETY: as above, and live descriptors.
        let done = unsafe {
            lt_call::get_matmul_algo_heuristic(self.light, plan.operation, layout_a, layout_b, layout_d, layout_d, plan.preference)
                .and_then(|best| {
                    lt_call::matmul(
                        self.light,
                        plan.operation,
                        scalar,
                        scalar,
                        a,
                        layout_a,
                        b,
                        layout_b,
                        c,
                        layout_d,
                        d,
                        layout_d,
                        &best.algo,
                        workspace,
                        WORKSPACE_BYTES as usize,
                        lab.cuda.cu_stream().cast(),
                    )
                })
        };
        done.map_err(|e| said("cublasLtMatmul", e))
    }
}

fn kind(dtype: DType) -> blas::cudaDataType {
    match dtype {
        DType::F32 => blas::cudaDataType::CUDA_R_32F,
        DType::F16 => blas::cudaDataType::CUDA_R_16F,
        _ => blas::cudaDataType::CUDA_R_16BF,
    }
}

/// The descriptors of one product.
struct LightPlan {
    operation: lt::cublasLtMatmulDesc_t,
    preference: lt::cublasLtMatmulPreference_t,
    /// Of A, B, and of C and D.
    layouts: [lt::cublasLtMatrixLayout_t; 3],
}

impl LightPlan {
    fn new(kind: lt::cudaDataType, p: &Product) -> std::result::Result<Self, lt_call::CublasError> {
        let layout = |rows: u64, cols: u64| lt_call::create_matrix_layout(kind, rows, cols, rows as i64);
        let preference = lt_call::create_matmul_pref()?;
        let most = lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: a live preference and eight bytes.
        unsafe { lt_call::set_matmul_pref_attribute(preference, most, ptr::from_ref(&WORKSPACE_BYTES).cast(), 8) }?;
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = lt_call::create_matmul_desc(compute, lt::cudaDataType::CUDA_R_32F)?;
        Ok(Self { operation, preference, layouts: [layout(p.cols, p.k)?, layout(p.k, p.out)?, layout(p.cols, p.out)?] })
    }
}

impl Drop for LightPlan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; cuBLAS read them when the product was enqueued.
        unsafe {
            let _ = lt_call::destroy_matmul_desc(self.operation);
            let _ = lt_call::destroy_matmul_pref(self.preference);
            for layout in self.layouts {
                let _ = lt_call::destroy_matrix_layout(layout);
            }
        }
    }
}

/// Adapters side by side, as many as each product takes. Values do not matter to it.
pub struct Peer {
    a: Buffer,
    b: Buffer,
    /// For the switch to either route.
    products: [Vec<Product>; 2],
}

impl Peer {
    pub fn new(lab: &Lab, model: &Model) -> Result<Self> {
        let (dtype, shapes) = (model.spec.dtype, &model.spec.shapes);
        let depths = [depths(model, 0), depths(model, 1)];
        let most = |target: usize| depths[0][target].max(depths[1][target]);
        let (a_at, a_len) = offsets((0..shapes.len()).map(|t| most(t) * shapes[t].1));
        let (b_at, b_len) = offsets((0..shapes.len()).map(|t| most(t) * shapes[t].0));
        let a = lab.random(dtype, a_len, 0.02, 5)?;
        let b = lab.random(dtype, b_len, 0.02, 6)?;
        let product = |target: usize, k: u64| {
            let (out, cols) = shapes[target];
            let start = model.starts[target];
            let d = model.weight.address(start, out * cols);
            let c = model.base.as_ref().map_or(d, |base| base.address(start, out * cols));
            Product { out, cols, k, a: a.address(a_at[target], k * cols), b: b.address(b_at[target], out * k), c, d }
        };
        let products = depths.map(|depths| depths.iter().enumerate().map(|(target, &k)| product(target, k)).collect());
        Ok(Self { a, b, products })
    }

    /// None where there is no cuBLAS; with its name.
    pub fn work(&self, lab: &Lab, model: &Model, nodes: usize) -> Result<Option<(String, Work)>> {
        debug_assert_eq!(self.a.dtype, self.b.dtype);
        let Some(cublas) = lab.cublas() else { return Ok(None) };
        let multiply = |products: &Vec<Product>| products.iter().try_for_each(|product| cublas.multiply(lab, model.spec.dtype, product));
        let mut graphs = Vec::new();
        for products in &self.products {
            multiply(products)?; // cuBLAS loads its kernels at their first use, which a capture forbids
            graphs.push(lab.capture(|| multiply(products))?);
        }
        let call = if model.spec.form == Form::InPlace { "GemmEx" } else { "LtMatmul" };
        Ok(Some((format!("{} {call}", cublas.name()), Work::new(graphs, nodes))))
    }
}

/// The concatenated rank of each target's terms, in steps of 16 bytes: other leading dimensions are slow.
fn depths(model: &Model, to: usize) -> Vec<u64> {
    let terms = model.spec.terms(to);
    let depth = |target: usize| terms.iter().map(|(slot, _)| model.spec.rank(*slot, target)).sum::<u64>();
    (0..model.spec.shapes.len()).map(|target| depth(target).next_multiple_of(8)).collect()
}

/// True if cudarc will find both libraries. It asks the loader by name only, and a library that is loaded
/// already answers to its name.
fn is_loadable() -> bool {
    // SAFETY: loading NVIDIA's libraries runs their initialisers.
    let present = || unsafe { blas::is_culib_present() && lt::is_culib_present() };
    let load = |folder: PathBuf| {
        // SAFETY: as above.
        let load = |name: &str| unsafe { libloading::Library::new(folder.join(name)) }.map(std::mem::forget).is_ok();
        let load_any = |stem: &str| ["so.13", "so.12", "so"].iter().any(|end| load(&format!("lib{stem}.{end}")));
        load_any("cublasLt") && load_any("cublas") && present()
    };
    present() || folders().into_iter().any(load)
}

/// Where the libraries may be: the folder that the user names, those of pip's packages, the toolkit.
fn folders() -> Vec<PathBuf> {
    let named = std::env::var_os("LORA_SWITCH_CUBLAS").map(PathBuf::from);
    let script = "import nvidia; print(*nvidia.__path__, sep='\\n')";
    let said = Command::new("python3").args(["-c", script]).output().map(|out| out.stdout).unwrap_or_default();
    let packages: Vec<PathBuf> = String::from_utf8_lossy(&said).lines().map(PathBuf::from).collect();
    let inside = packages.iter().flat_map(|dir| ["cu13/lib", "cublas/lib"].map(|lib| dir.join(lib)));
    named.into_iter().chain(inside).chain([PathBuf::from("/usr/local/cuda/lib64")]).collect()
}
