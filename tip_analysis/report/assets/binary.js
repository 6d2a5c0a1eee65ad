/** Columns of numbers, as `binary.py` packs them. */
tip.binary = (() => {
  const KINDS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array, f64: Float64Array };

  /**
   * @param {{type: string, data: string}} column little-endian bytes in base64
   * @returns {Uint8Array|Uint16Array|Uint32Array|Float32Array|Float64Array}
   */
  const unpack = (column) => {
    const text = atob(column.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) { bytes[i] = text.charCodeAt(i); }
    return new KINDS[column.type](bytes.buffer);
  };
  return { unpack };
})();
