//! What ptxas said about each kernel when it was built: no stack frame, no spill, no wgmma that ptxas
//! had to serialise, and code for every card that this nvcc can build for.
//!
//! build.rs keeps what ptxas said beside each fatbin and lists it in OUT_DIR/reports.rs, so that what is
//! read here belongs to the very images under test.

use crate::common::skip;
use regex::Regex;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

include!(concat!(env!("OUT_DIR"), "/reports.rs"));

/// False, aloud, if the kernels were not built.
fn kernels_were_built() -> bool {
    if REPORTS.is_empty() {
        skip(&format!("the kernels were not built: {BUILT_WITH}"));
    }
    !REPORTS.is_empty()
}

/// The line with which ptxas opens what it says of each kernel.
fn entry() -> Regex {
    Regex::new(r"Compiling entry function '(\S+)' for '(sm_\w+)'").unwrap()
}

/// All faults in one report: sizes with the kernel and card they belong to, and ptxas' own words, which
/// name the kernel and stand before its entry.
fn faults(report: &str) -> Vec<String> {
    let sizes = Regex::new(r"(\d+) bytes (stack frame|spill stores|spill loads)").unwrap();
    // C7510 to C7520 are about wgmma; an ignored setmaxnreg is a "Potential Performance Loss" too.
    let remarks = Regex::new(r"\bC75(1\d|20)\b|serializ|Potential Performance Loss").unwrap();
    let (entry, mut kernel, mut faults) = (entry(), String::new(), Vec::new());
    for line in report.lines() {
        if let Some(found) = entry.captures(line) {
            kernel = format!("{} for {}", &found[1], &found[2]);
        }
        if remarks.is_match(line) {
            faults.push(line.to_owned());
        }
        if sizes.captures_iter(line).any(|size| &size[1] != "0") {
            faults.push(format!("{kernel}: {}", line.trim()));
        }
    }
    faults
}

/// Each kernel of a report with the cards that it was compiled for, sorted.
fn targets(report: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut targets = BTreeMap::<_, Vec<_>>::new();
    for found in entry().captures_iter(report) {
        let (_, [kernel, target]) = found.extract();
        targets.entry(kernel).or_default().push(target);
    }
    targets.values_mut().for_each(|list| list.sort());
    targets
}

/// What kernels/`stem`.cu is to be compiled for; said here a second time, so that build.rs cannot drop a
/// target unseen. 10.0 and 12.0 came with nvcc 12.8.
fn expected(stem: &str, release: (u32, u32)) -> &'static [&'static str] {
    match stem {
        _ if stem.ends_with("_sm90") => &["sm_90a"],
        _ if release < (12, 8) => &["sm_80", "sm_90"],
        _ => &["sm_100", "sm_120", "sm_80", "sm_90"],
    }
}

#[test]
fn no_kernel_spills_or_serialises() {
    if kernels_were_built() {
        let faults: Vec<_> = REPORTS.iter().flat_map(|(_, report)| faults(report)).collect();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}

#[test]
fn every_kernel_is_there_for_every_card() {
    if !kernels_were_built() {
        return;
    }
    let release = Regex::new(r"release (\d+)\.(\d+)").unwrap().captures(BUILT_WITH).expect(BUILT_WITH);
    let release = (release[1].parse().unwrap(), release[2].parse().unwrap());
    for (stem, report) in REPORTS {
        let kernels = targets(report);
        assert!(!kernels.is_empty(), "{stem}: no kernel in its report:\n{report}");
        for (kernel, targets) in kernels {
            assert_eq!(targets, expected(stem, release), "{kernel} of {stem}.cu");
        }
    }
}

/// A kernel file that is not in the tables would be neither checked nor shipped.
#[test]
fn every_kernel_file_is_built() {
    if !kernels_were_built() {
        return;
    }
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|file| file.extension().is_some_and(|e| e == "cu"));
    let mut stems: Vec<_> = sources.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    stems.sort();
    assert_eq!(stems, REPORTS.iter().map(|(stem, _)| *stem).collect::<Vec<_>>());
}

/// The machine code of an image: cuobjdump's, of `make setup` or on PATH. None, said aloud, where there is none, or where the build's
/// files are gone.
fn machine_code(stem: &str) -> Option<String> {
    let image = Path::new(env!("OUT_DIR")).join(format!("{stem}.fatbin"));
    if !image.is_file() {
        skip(&format!("{} is not there: built elsewhere", image.display()));
        return None;
    }
    let local = Path::new("target/cuda-tools/nvidia/cu13/bin/cuobjdump");
    let tool = if local.is_file() { local } else { Path::new("cuobjdump") };
    let Ok(out) = Command::new(tool).arg("-sass").arg(image).output() else {
        skip("no cuobjdump (`make setup` fetches it)");
        return None;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(String::from_utf8(out.stdout).unwrap())
}

/// Each function of a listing, which names it once for each card, and how many of its lines have the instruction.
fn occurrences<'l>(listing: &'l str, instruction: &str) -> Vec<(&'l str, usize)> {
    let instruction = Regex::new(instruction).unwrap();
    let mut counts = Vec::<(&str, usize)>::new();
    for line in listing.lines() {
        if let Some((_, name)) = line.split_once("Function : ") {
            counts.push((name.trim(), 0));
        } else if let Some((_, count)) = counts.last_mut() {
            *count += usize::from(instruction.is_match(line));
        }
    }
    counts
}

/// The kernels of the Hopper path multiply by wgmma, HGMMA in machine code, those of the portable path by mma.sync; and no kernel has
/// anything in local memory.
#[test]
fn machine_code_is_what_it_should_be() {
    if !kernels_were_built() {
        return;
    }
    for (stem, _) in REPORTS {
        let Some(listing) = machine_code(stem) else { return };
        let local = occurrences(&listing, r"\b(LDL|STL)\b");
        assert!(!local.is_empty(), "{stem}: no function in\n{listing}");
        assert!(local.iter().all(|(_, n)| *n == 0), "{stem}: local memory: {local:?}");
        let tensor = match *stem {
            stem if stem.ends_with("_sm90") => r"\bHGMMA\b",
            "switch" => r"\bHMMA\b",
            _ => continue,
        };
        let mut tensor = occurrences(&listing, tensor);
        tensor.retain(|(name, _)| *name != "lsw_switch_current");
        assert!(!tensor.is_empty() && tensor.iter().all(|(_, n)| *n > 0), "{stem}: no tensor cores: {tensor:?}");
    }
}

/// The checks above see nothing if ptxas changes its words: these are nvcc 13.0's, faults included.
#[test]
fn faults_are_recognised() {
    let report = "\
ptxas info    : (C7519) warpgroup.arrive is injected in around line 35 by compiler to allow use of registers in GMMA in function 'bad'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function 'bad'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'bad' for 'sm_90a'
ptxas info    : Function properties for bad
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compiling entry function 'good' for 'sm_80'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 0 barriers, 376 bytes cmem[0], 8 bytes cmem[2]
";
    let faults = faults(report);
    assert_eq!(faults.len(), 3, "{faults:?}");
    assert!(faults[2].starts_with("bad for sm_90a: 160 bytes stack frame"), "{faults:?}");
    for size in ["1 bytes stack frame", "8 bytes spill stores", "10 bytes spill loads"] {
        assert_eq!(self::faults(size).len(), 1, "{size}");
    }
    assert_eq!(targets(report)["good"], ["sm_80"]);
}
