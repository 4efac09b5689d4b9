"""The little that Envoy does in Lua, and its own words for callers.

`SCRIPT` gives errors that neither a handler nor Envoy made our form, the status kept. A handler's answer carries
x-component; Envoy's own carries x-torchrelay-own-reply, which ends here.
"""

import json

TOO_MANY = "more requests a second than this component takes; ask again in a second"

SCRIPT = r"""
local function error_text(status, body)
  -- TorchServe prints one key a line; a JSON string holds no raw newline, so this is the whole string, still escaped.
  local message = body:match('"message"%s*:%s*"(.-)"%s*\n')
  if message and message ~= "" then
    return message
  end
  return "the engine answered " .. status
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local status = headers:get(":status")
  if tonumber(status) < 400 or headers:get("x-component") then
    return
  end
  if headers:get("x-torchrelay-own-reply") then
    headers:remove("x-torchrelay-own-reply")
    headers:remove("x-envoy-ratelimited")
    return
  end
  local body = handle:body(true)
  local text = error_text(status, tostring(body:getBytes(0, body:length())))
  -- Waiting for the body has made the headers taken before it invalid.
  headers = handle:headers()
  local length = body:setBytes('{"error":"' .. text .. '","request_id":"' .. headers:get("x-request-id") .. '"}')
  headers:replace("content-length", length)
  headers:replace("content-type", "application/json")
end
"""


def path_script(path: str) -> str:
    """Lua that asks the engine for `path`, with the caller's query, whatever path the request came with.

    And without the headers that Envoy puts onto mirrored requests: they would cost the mirror time that the version in
    service does not spend.
    """
    # A JSON string of plain characters is a Lua string as well.
    return f"""
function envoy_on_request(handle)
  local headers = handle:headers()
  headers:replace(":path", {json.dumps(path)} .. (headers:get(":path"):match("%?.*") or ""))
  headers:remove("x-envoy-internal")
  headers:remove("x-forwarded-for")
end
"""
