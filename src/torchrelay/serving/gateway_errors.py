"""What Envoy's Lua filter does with errors that neither a handler nor Envoy made: our form, the status kept.

A handler's answer carries x-component; Envoy's own carries x-torchrelay-own-reply, which ends here.
"""

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
