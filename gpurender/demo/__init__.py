"""The bundled avatar: what is in `files`, and how it is made. Start reading at `build`."""
