//! Memory for the tables that a bank or a switch set keeps on its device.

/// Whose memory holds an object's device tables. On a CPU context it is not used.
#[derive(Debug, Default)]
pub struct StateMemory(pub(crate) Option<(u64, u64)>);

impl StateMemory {
    /// The object allocates its own at creation and frees it when it is dropped. Both synchronise the device.
    pub const fn allocate() -> Self {
        Self(None)
    }

    /// The caller's: `bytes` of device memory at `addr`, a multiple of 128. The object initialises it.
    ///
    /// # Safety
    /// Nobody else touches the memory until the object is gone and its work has finished.
    pub const unsafe fn at(addr: u64, bytes: u64) -> Self {
        Self(Some((addr, bytes)))
    }
}
