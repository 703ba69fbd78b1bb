"""An external processor for Envoy (ext_proc): the guard inside a gateway, without a proxy.

One gRPC stream is one HTTP exchange. It is told to the ASGI middleware as a server would tell it,
with Envoy in the place of both the client and the application; so what is screened, and how, is
decided by the very code that the middleware runs.
"""
